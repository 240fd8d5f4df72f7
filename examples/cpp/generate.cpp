// Decodes with what `mlx-redrafter export --mlxfn` wrote. There is no Python in the process.
#include <chrono>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <random>
#include <sstream>

#include "json.h"
#include "mlx/mlx.h"

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;

mx::Dtype dtype_of(const std::string& name) {
  for (auto dtype : {mx::uint8, mx::uint32, mx::int32, mx::int64, mx::float32, mx::float16, mx::bfloat16}) {
    std::ostringstream known;
    known << dtype;
    if (known.str() == name) return dtype;
  }
  throw std::runtime_error("dtype " + name + " is not known");
}

mx::Shape shape_of(const Json& sizes) {
  mx::Shape shape;
  for (auto& size : sizes.items) shape.push_back(static_cast<int>(size.number));
  return shape;
}

mx::array integers(const std::vector<int>& values, const mx::Shape& shape) {
  return mx::array(values.data(), shape, mx::int32);
}

// One text, and the model that goes on with it.
class Text {
 public:
  const Json manifest;
  size_t rows = 0; // tokens that the buffers hold: all of the text but the last

  explicit Text(const std::string& folder) : manifest(read(folder + "/manifest.json")), folder_(folder) {
    on_gpu_ = manifest["device"].text == "gpu"; // functions run where they were exported for
    mx::set_default_device(on_gpu_ ? mx::Device::gpu : mx::Device::cpu);
    auto weights = mx::load_safetensors(folder + "/" + manifest["weights"]["file"].text).first;
    for (auto& each : manifest["weights"]["arrays"].items) weights_.push_back(weights.at(each["name"].text));
    mx::eval(weights_);
  }

  const Json& function(const std::string& name) const {
    for (auto& each : manifest["functions"].items) {
      if (each["name"].text == name) return each;
    }
    throw std::runtime_error("the manifest has no function " + name);
  }

  void read_prompt(const std::vector<int>& prompt) {
    for (auto& each : manifest["state"].items) {
      state_.push_back(mx::zeros(shape_of(each["shapes"].items[0]), dtype_of(each["dtype"].text)));
    }
    state_[0] = integers({prompt.at(0)}, {1}); // the last token of the text as yet
    for (size_t at = 1; at < prompt.size();) {
      const Json* chunk = nullptr; // the largest that is full, or the smallest, which comes first
      for (auto& each : manifest["functions"].items) {
        bool is_full = each["kind"].text == "prefill" && each["tokens"].number <= prompt.size() - at;
        if (!chunk || is_full) chunk = &each;
      }
      size_t size = (*chunk)["tokens"].number, count = std::min(size, prompt.size() - at);
      std::vector<int> tokens(prompt.begin() + at, prompt.begin() + at + count);
      tokens.resize(size);
      call(*chunk, {integers(tokens, {1, int(size)}), integers({int(count)}, {1})});
      at += count;
      rows += count;
    }
  }

  // A step: the tokens that it says.
  std::vector<int> step(const Json& function, const Arrays& sampling) {
    auto found = call(function, sampling);
    auto tokens = found[0].data<int>();
    rows += found[1].item<int>();
    return {tokens, tokens + found[1].item<int>()};
  }

 private:
  const std::string folder_;
  bool on_gpu_;
  Arrays weights_, state_;
  size_t size_ = 0; // of the buffers, among the capacities
  std::map<std::string, std::function<Arrays(const Arrays&)>> loaded_;

  static Json read(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + " cannot be read");
    return Json::read({std::istreambuf_iterator<char>(file), {}});
  }

  // What a function gives besides the state, which goes on.
  Arrays call(const Json& function, Arrays inputs) {
    auto& capacities = manifest["capacities"].items;
    while (rows + function["room"].number > capacities.at(size_).number) ++size_;
    auto& run = loaded(function["files"].items[size_].text);
    for (size_t i = 0; i < state_.size(); ++i) {
      inputs.push_back(grown(state_[i], shape_of(manifest["state"].items[i]["shapes"].items[size_])));
    }
    state_.clear();
    inputs.insert(inputs.end(), weights_.begin(), weights_.end());
    auto found = run(inputs);
    inputs.clear(); // nobody but the graph holds the buffers now, so that they are written to in place
    mx::eval(found);
    auto end = found.begin() + function["outputs"].items.size();
    state_.assign(end, found.end());
    return {found.begin(), end};
  }

  const std::function<Arrays(const Arrays&)>& loaded(const std::string& file) {
    if (!loaded_.count(file)) {
      auto imported = mx::import_function(folder_ + "/" + file);
      std::function<Arrays(const Arrays&)> run = [imported](const Arrays& inputs) { return imported(inputs); };
      loaded_[file] = on_gpu_ ? mx::compile(run) : run; // which joins small kernels to larger ones
    }
    return loaded_[file];
  }

  static mx::array grown(const mx::array& buffer, const mx::Shape& shape) {
    std::vector<std::pair<int, int>> missing;
    for (size_t axis = 0; axis < shape.size(); ++axis) missing.push_back({0, shape[axis] - buffer.shape(axis)});
    return buffer.shape() == shape ? buffer : mx::pad(buffer, missing);
  }
};

int run(const std::vector<std::string>& words) {
  std::map<std::string, std::string> flags{{"--max-tokens", "100"}};
  std::vector<int> prompt;
  for (size_t i = 1; i < words.size(); ++i) {
    if (words[i].starts_with("--") && i + 1 < words.size()) flags[words[i]] = words[i + 1], ++i;
    else prompt.push_back(std::stoi(words[i]));
  }
  auto number = [&](const std::string& flag) { return flags.count(flag) ? std::stod(flags[flag]) : 0.0; };
  if (words.empty() || prompt.empty()) {
    throw std::runtime_error(
        "usage: generate FOLDER TOKEN... [--max-tokens N] [--step NAME] [--temperature T --seed N "
        "[--top-p P] [--top-k K] [--min-p P]]");
  }

  Text text(words[0]);
  size_t most = number("--max-tokens"), context = text.manifest["context"].number;
  if (prompt.size() >= context) throw std::runtime_error("the prompt is longer than the context");
  for (int token : prompt) {
    if (token < 0 || token >= text.manifest["vocabulary"].number) throw std::runtime_error("no such token");
  }
  bool filters = flags.count("--top-p") || flags.count("--top-k") || flags.count("--min-p");
  std::string sampling = filters ? "filters" : number("--temperature") > 0 ? "temperature" : "greedy";
  auto name = flags.count("--step") ? flags["--step"] : text.manifest["step"].text;
  auto& step = text.function(name + "-" + sampling);
  Arrays settings;
  if (sampling != "greedy") {
    uint64_t seed = flags.count("--seed") ? std::stoull(flags["--seed"]) : std::random_device()();
    settings.push_back(mx::array({uint32_t(seed >> 32), uint32_t(seed)}));
    settings.push_back(mx::array({float(number("--temperature"))}));
  }
  if (filters) {
    auto top_p = mx::array({float(number("--top-p"))}), min_p = mx::array({float(number("--min-p"))});
    settings.insert(settings.end(), {top_p, integers({int(number("--top-k"))}, {1}), min_p});
  }

  text.read_prompt(prompt);
  size_t said = 0, steps = 0;
  auto begun = std::chrono::steady_clock::now();
  for (bool ended = false; !ended && said < most && text.rows + 1 < context; ++steps) {
    for (int token : text.step(step, settings)) {
      if (ended || said == most) break;
      ++said;
      std::cout << token << " " << std::flush;
      for (auto& each : text.manifest["stop"].items) ended = ended || each.number == token;
    }
  }
  std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begun;
  std::cout << "\n";
  std::cerr << said << " tokens in " << steps << " steps, " << double(said) / steps
            << " tokens per step, " << took.count() / steps << " ms per step, "
            << mx::get_peak_memory() / 1e6 << " MB at most\n";
  return 0;
}

int main(int count, char** words) {
  try {
    return run({words + 1, words + count});
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
