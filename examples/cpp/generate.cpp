// generate PACKAGE NEW_TOKENS ID...: the likeliest ids behind a prompt of token ids, on one line.

#include <cstdlib>
#include <exception>
#include <iostream>
#include <vector>

#include "kvpass.hpp"

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: " << arguments[0] << " PACKAGE NEW_TOKENS ID...\n";
    return 2;
  }
  try {
    const int64_t new_tokens = std::stoll(arguments[2]);
    std::vector<int64_t> prompt;
    for (int i = 3; i < count; ++i) prompt.push_back(std::stoll(arguments[i]));

    kvpass::Model model(arguments[1]);
    kvpass::State state;
    const at::Tensor ids = at::tensor(prompt, at::kLong).unsqueeze(0);
    at::Tensor logits = model.prefill(ids, state, new_tokens);
    for (int64_t i = 0; i < new_tokens; ++i) {
      const at::Tensor token = logits.narrow(1, logits.size(1) - 1, 1).argmax(-1);
      const auto id = token.item<int64_t>();
      std::cout << (i ? " " : "") << id;
      if (model.ends(id) || i + 1 == new_tokens) break;
      logits = model.append(token, state);
    }
    std::cout << '\n';
  } catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
