// Runs a package that `model.export("model.pt2", "aot_inductor")` wrote: no Python, no copy of the weights.
//
//   kvpass::Model model("model.pt2");
//   kvpass::State state;
//   at::Tensor logits = model.prefill(prompt, state, /*room=*/256);  // prompt: int64 [B, S]; logits [B, 1, V]
//   logits = model.append(token, state);                             // token: int64 [B, n]; logits [B, n, V]
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "json.hpp"

namespace kvpass {

using Tensors = std::map<std::string, at::Tensor>;

// What the phases hand on: lengths, next_position, and keys_i, values_i (and positions_i) of each layer.
struct State {
  Tensors tensors;
  std::vector<int64_t> used;  // slots in use, per layer
  int64_t seen = 0;           // tokens
};

class Model {
 public:
  explicit Model(const std::string& path) : file_(path) {
    caffe2::serialize::PyTorchStreamReader archive(path);
    const auto [text, size] = archive.getRecord("extra/kvpass.json");
    manifest_ = Json::parse({static_cast<const char*>(text.get()), size});
    if (manifest_["kind"].text() != "aot_inductor") throw std::runtime_error(path + " is no AOTInductor package");
    if (manifest_["device"].text() != "cpu") throw std::runtime_error("this example runs packages for the CPU");
    for (const auto& [record, facts] : manifest_["records"].members()) {
      weights_[record] = at::from_blob(file_.bytes + archive.getRecordOffset(record), facts["shape"].integers(),
                                       facts["stride"].integers(), at::TensorOptions(dtype(facts["dtype"].text())));
    }
    for (const Json& phase : manifest_["phases"].items()) load(path, phase["name"].text());
  }

  int64_t batch_size() const { return manifest_["batch_size"].integer(); }
  bool ends(int64_t token) const {
    const auto ids = manifest_["eos_token_ids"].integers();
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  }

  // Read a prompt. A prompt that is too short for the press is kept whole.
  at::Tensor prefill(const at::Tensor& ids, State& state, int64_t room) {
    const Json& phase = choose(ids.size(1), /*empty=*/true);
    if (phase["phase"].text() != "prefill") {
      state = empty(ids.size(1) + room);
      return append(ids, state).narrow(1, ids.size(1) - 1, 1);
    }
    Tensors found = run(phase, {{"input_ids", ids}});
    state = State{{}, {}, ids.size(1)};
    const at::Tensor slots = found.at("lengths").amax(1).contiguous();
    state.used.assign(slots.data_ptr<int64_t>(), slots.data_ptr<int64_t>() + slots.numel());
    const at::Tensor logits = found.at("logits");
    for (auto& [name, tensor] : found) {
      if (name != "logits" && name.rfind("kept", 0) != 0) state.tensors.emplace(name, std::move(tensor));
    }
    resize(state, room);
    return logits;
  }

  // Read more tokens; the state is updated in place.
  at::Tensor append(const at::Tensor& ids, State& state) {
    const int64_t tokens = ids.size(1);
    if (state.seen + tokens > manifest_["max_tokens"].integer()) throw std::runtime_error("the text is too long");
    for (const int64_t layer : growing()) {
      if (state.tensors.at("keys_" + std::to_string(layer)).size(2) < state.used[layer] + tokens) {
        resize(state, std::max<int64_t>(tokens, 256));
        break;
      }
    }
    Tensors inputs = state.tensors;
    inputs["input_ids"] = ids;
    Tensors found = run(choose(tokens, /*empty=*/false), inputs);
    for (int64_t& used : state.used) used += tokens;
    state.seen += tokens;
    return found.at("logits");
  }

 private:
  // The package in memory: pages are read when they are needed, and shared with other processes.
  struct MappedFile {
    explicit MappedFile(const std::string& path) {
      const int file = open(path.c_str(), O_RDONLY);
      struct stat facts {};
      if (file < 0 || fstat(file, &facts) != 0) throw std::runtime_error(path + " cannot be read");
      size = static_cast<size_t>(facts.st_size);
      void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
      close(file);
      if (found == MAP_FAILED) throw std::runtime_error(path + " cannot be mapped");
      bytes = static_cast<char*>(found);
    }
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    ~MappedFile() { munmap(bytes, size); }
    char* bytes = nullptr;
    size_t size = 0;
  };

  static at::ScalarType dtype(const std::string& name) {
    static const std::map<std::string, at::ScalarType> known = {
        {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble},
        {"int64", at::kLong},    {"int32", at::kInt},    {"bool", at::kBool}};
    const auto found = known.find(name);
    if (found == known.end()) throw std::runtime_error("tensors of " + name + " are not known here");
    return found->second;
  }

  // A library whose weights were not given crashes when it runs, so a model without all of them is never made.
  void load(const std::string& path, const std::string& phase) {
    auto loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, phase);
    std::unordered_map<std::string, at::Tensor> given;
    const auto& stored = manifest_["weights"][phase].members();
    for (const std::string& name : loader->get_constant_fqns()) {
      const auto found = stored.find(name);
      if (found == stored.end()) throw std::runtime_error(phase + " lacks the weight " + name);
      given[name] = weights_.at(found->second.text());
    }
    loader->load_constants(given, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    loaders_[phase] = std::move(loader);
  }

  const Json& choose(int64_t tokens, bool empty) const {
    const auto takes = [tokens](const Json& phase) {
      const auto& ranges = phase["tokens"].items();
      return std::any_of(ranges.begin(), ranges.end(), [tokens](const Json& range) {
        return range.items()[0].integer() <= tokens && tokens <= range.items()[1].integer();
      });
    };
    std::vector<std::string> wanted = {tokens == 1 ? "decode" : "extend"};
    if (empty && tokens > 1) wanted.insert(wanted.begin(), "prefill");
    for (const std::string& kind : wanted) {
      for (const Json& phase : manifest_["phases"].items()) {
        if (phase["phase"].text() == kind && takes(phase)) return phase;
      }
    }
    throw std::runtime_error("the package was not exported for " + std::to_string(tokens) + " tokens at once");
  }

  Tensors run(const Json& phase, const Tensors& inputs) {
    std::vector<at::Tensor> ordered;
    for (const Json& port : phase["inputs"].items()) ordered.push_back(inputs.at(port["name"].text()));
    const std::vector<at::Tensor> found = loaders_.at(phase["name"].text())->run(ordered);
    Tensors named;
    for (size_t i = 0; i < found.size(); ++i) named[phase["outputs"].items().at(i)["name"].text()] = found[i];
    return named;
  }

  // The layers that store every token: no rings, and none that reads the keys of another one.
  std::vector<int64_t> growing() const {
    std::vector<int64_t> found;
    const auto& layers = manifest_["layers"].items();
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i]["ring"].is_null() && layers[i]["reads"].is_null()) found.push_back(static_cast<int64_t>(i));
    }
    return found;
  }

  void resize(State& state, int64_t room) const {
    for (const int64_t layer : growing()) {
      for (const char* role : {"keys_", "values_", "positions_"}) {
        const auto found = state.tensors.find(role + std::to_string(layer));
        if (found == state.tensors.end()) continue;
        std::vector<int64_t> shape = found->second.sizes().vec();
        shape[2] = state.used[layer] + room;
        at::Tensor grown = at::zeros(shape, found->second.options());
        grown.narrow(2, 0, state.used[layer]).copy_(found->second.narrow(2, 0, state.used[layer]));
        found->second = grown;
      }
    }
  }

  State empty(int64_t slots) const {
    const auto& layers = manifest_["layers"].items();
    const auto count = static_cast<int64_t>(layers.size());
    State state{{}, std::vector<int64_t>(layers.size(), 0), 0};
    state.tensors["lengths"] = at::zeros({count, batch_size()}, at::kLong);
    state.tensors["next_position"] = at::zeros({batch_size()}, at::kLong);
    for (const Json& port : choose(1, false)["inputs"].items()) {
      if (port["layer"].is_null()) continue;
      const Json& layer = layers[static_cast<size_t>(port["layer"].integer())];
      std::vector<int64_t> shape = {batch_size(), layer["kv_heads"].integer(),
                                    layer["ring"].is_null() ? slots : layer["ring"].integer()};
      if (port["role"].text() == "keys") shape.push_back(layer["key_size"].integer());
      if (port["role"].text() == "values") shape.push_back(layer["value_size"].integer());
      state.tensors[port["name"].text()] = at::zeros(shape, dtype(port["dtype"].text()));
    }
    return state;
  }

  MappedFile file_;
  Json manifest_;
  std::map<std::string, at::Tensor> weights_;
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> loaders_;
};

}  // namespace kvpass
