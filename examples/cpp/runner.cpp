// Runs an exported engine with libtorch alone, without Python.
//
//   runner features ENGINE OUT.bin IMAGE.ppm...          image features (V, T_img, D), as raw float32
//   runner generate ENGINE IDS.txt COUNT IMAGE.ppm...    greedy tokens behind a prompt's ids, on standard output
//
// ENGINE is a folder of `python -m qwen_batched.export --target engine`; an image, a binary PPM of the exported size,
// for each camera; IDS.txt a prompt's token ids, each image token repeated as often as an image has cells.
#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#ifdef WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>

using at::Tensor;
using torch::inductor::AOTIModelPackageLoader;
using Settings = std::map<std::string, std::string>;

const std::string FORMAT = "2";  // of runner.txt, as in qwen_batched.export.manifest_reading
// What it must name, and how many numbers of each at least.
const std::map<std::string, size_t> NEEDED{
    {"format", 1}, {"image_token_id", 1}, {"vocabulary_size", 1}, {"batch", 2}, {"grid", 2}, {"eos_token_ids", 0},
    {"repetition_penalty", 1}, {"frames", 3}, {"frame_bits", 1}, {"cache", 3}, {"cuda", 1}, {"torch", 3}, {"device", 0}};

std::vector<double> numbers(const Settings& settings, const std::string& name) {
  std::istringstream words(settings.at(name));
  return {std::istream_iterator<double>(words), {}};
}

// runner.txt: in each line a name, and what belongs to it.
Settings read_settings(const std::string& folder) {
  const std::string path = folder + "/runner.txt";
  Settings settings;
  std::ifstream file(path);
  if (!file) throw std::runtime_error(folder + " holds no runner.txt");
  for (std::string line; std::getline(file, line);) {
    const auto space = std::min(line.find(' '), line.size());
    settings[line.substr(0, space)] = line.substr(std::min(space + 1, line.size()));
  }
  const std::string format = settings.count("format") ? settings["format"] : "none";
  if (format != FORMAT)
    throw std::runtime_error(path + " must be of format " + FORMAT + ", got " + format + ": export the engine again");
  for (const auto& [name, count] : NEEDED)
    if (!settings.count(name) || numbers(settings, name).size() < count)
      throw std::runtime_error(path + " must have " + name + " and " + std::to_string(count) +
                               " numbers or more of it: export the engine again");
  return settings;
}

std::vector<int64_t> integers(const Settings& settings, const std::string& name) {
  const auto found = numbers(settings, name);
  return {found.begin(), found.end()};
}

// Where the engine runs. Its packages hold code for one version of PyTorch and one kind of device.
at::Device check_device(const Settings& settings) {
  const std::vector<int64_t> version{TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH};
  if (integers(settings, "torch") != version)
    throw std::runtime_error("the engine was made for PyTorch " + settings.at("torch") + ", got " + TORCH_VERSION);
  const bool on_gpu = numbers(settings, "cuda")[0];
  std::string device = on_gpu ? "no GPU" : "CPU " + at::get_cpu_capability();
#ifdef WITH_CUDA
  if (on_gpu && at::cuda::is_available()) device = at::cuda::getCurrentDeviceProperties()->name;
#endif
  if (device != settings.at("device"))
    throw std::runtime_error("the engine was made for " + settings.at("device") + ", got " + device);
  return on_gpu ? at::kCUDA : at::kCPU;
}

// What a package gives. On a GPU by a CUDA graph, which a loop would keep, and replay after it has copied new values into
// `inputs`.
std::vector<Tensor> run(AOTIModelPackageLoader& package, const std::vector<Tensor>& inputs) {
  auto results = package.run(inputs);
#ifdef WITH_CUDA
  if (inputs[0].is_cuda()) {
    at::cuda::CUDAGraph graph;
    c10::cuda::getCurrentCUDAStream().synchronize();
    {
      const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool());
      graph.capture_begin();
      results = package.run(inputs);
      graph.capture_end();
    }
    graph.replay();
    for (Tensor& result : results) result = result.clone();
    c10::cuda::getCurrentCUDAStream().synchronize();
  }
#endif
  return results;
}

// A binary PPM of one image as uint8 (3, H, W).
Tensor read_ppm(const std::string& path, int64_t expected_height, int64_t expected_width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic, comment;
  int64_t header[3] = {};  // width, height, largest value
  file >> magic;
  for (int64_t& number : header) {
    while ((file >> std::ws).peek() == '#') std::getline(file, comment);
    file >> number;
  }
  const auto [width, height, largest] = header;
  if (!file || magic != "P6" || width < 1 || height < 1 || largest != 255)
    throw std::runtime_error(path + " must be a binary PPM of 8 bits");
  if (width != expected_width || height != expected_height)
    throw std::runtime_error(path + " must be " + std::to_string(expected_width) + " pixels wide and " +
                             std::to_string(expected_height) + " high, got " + std::to_string(width) + " and " +
                             std::to_string(height));
  file.get();
  Tensor pixels = at::empty({height, width, 3}, at::kByte);
  if (!file.read(reinterpret_cast<char*>(pixels.data_ptr()), pixels.numel()))
    throw std::runtime_error(path + " ends before its last pixel");
  if (file.peek() != EOF)  // as where line ends are of two characters, and all pixels are moved by one
    throw std::runtime_error(path + " must end with its last pixel, and goes on");
  return pixels.permute({2, 0, 1}).contiguous();
}

// A sample's frames (1, V, 3, H, W). A package checks neither shape nor dtype: it would read past the end of others.
Tensor read_frames(const std::vector<std::string>& paths, const Settings& settings) {
  const auto shape = integers(settings, "frames");  // cameras, height, width
  if (integers(settings, "batch")[0] > 1)
    throw std::runtime_error("the engine must take a single sample, and does not");
  if (static_cast<int64_t>(paths.size()) != shape[0])
    throw std::runtime_error("expected " + std::to_string(shape[0]) + " images, got " + std::to_string(paths.size()));
  std::vector<Tensor> frames;
  for (const auto& path : paths) frames.push_back(read_ppm(path, shape[1], shape[2]));
  const Tensor pixels = at::stack(frames).unsqueeze(0);
  const int64_t bits = integers(settings, "frame_bits")[0];  // 8: uint8 in 0..255; else floating, in 0..1
  return bits == 8 ? pixels : pixels.to(at::kFloat).div(255).to(bits == 16 ? at::kHalf : at::kFloat);
}

Tensor read_ids(const std::string& path, int64_t vocabulary) {
  std::ifstream file(path);
  std::vector<int64_t> ids{std::istream_iterator<int64_t>(file), {}};
  if (ids.empty()) throw std::runtime_error(path + " holds no token ids");
  if (!file.eof()) throw std::runtime_error(path + " must hold whole numbers, with spaces between them");
  for (const int64_t id : ids)  // of others a package ends the process
    if (id < 0 || id >= vocabulary)
      throw std::runtime_error(path + " must hold ids from 0 to " + std::to_string(vocabulary - 1) + ", got " +
                               std::to_string(id));
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

// Rope positions (3, 1, S) where all images have `grid`, as `rope_positions` of qwen_batched.export.programs.
Tensor rope_positions(const Tensor& is_image, const std::vector<int64_t>& grid) {
  const int64_t cells = grid[0] * grid[1];
  Tensor cell = at::remainder(is_image.to(at::kLong).cumsum(1) - 1, cells);
  Tensor last = (cell == cells - 1).to(at::kLong) * std::max(grid[0], grid[1]);
  Tensor advance = at::where(is_image, last, at::ones_like(last));
  Tensor first = advance.cumsum(1) - advance, none = at::zeros_like(cell);
  Tensor row = at::where(is_image, cell.div(grid[1], "floor"), none);
  Tensor column = at::where(is_image, at::remainder(cell, grid[1]), none);
  return at::stack({first, first + row, first + column});
}

// Features (..., M, D) in the place of the image tokens, (..., S, D), zeros elsewhere.
Tensor place(const Tensor& features, const Tensor& is_image) {
  std::vector<int64_t> sizes = features.sizes().vec();
  sizes[sizes.size() - 2] = is_image.size(1);
  return at::zeros(sizes, features.options()).index_copy(-2, is_image[0].nonzero().flatten(), features);
}

int64_t read_count(const std::string& word) {
  std::istringstream words(word);
  int64_t count = 0;
  if (!(words >> count) || count < 1 || words.peek() != EOF)
    throw std::runtime_error("COUNT must be a whole number from 1, got " + word);
  return count;
}

void write_floats(const std::string& path, const Tensor& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(values.data_ptr()), values.nbytes());
  file.close();
  if (file) return;
  if (std::filesystem::is_regular_file(path)) std::filesystem::remove(path);  // what there is of it
  throw std::runtime_error(path + " cannot be written");
}

void generate(const std::string& folder, const Settings& settings, Tensor ids, int64_t count,
              const std::vector<Tensor>& features) {
  AOTIModelPackageLoader decoder(folder + "/cached_decoder.pt2");
  const at::Device device = features[0].device();
  const auto cache = integers(settings, "cache");  // layers, key-value heads, size of a head
  const auto ends = integers(settings, "eos_token_ids");
  const double penalty = numbers(settings, "repetition_penalty")[0];
  ids = ids.to(device);
  Tensor is_image = ids == integers(settings, "image_token_id")[0], seen = ids;
  Tensor mask = at::ones_like(ids), positions = rope_positions(is_image, integers(settings, "grid"));
  if (is_image.sum().item<int64_t>() != features[0].size(1) * features[0].size(2))
    throw std::runtime_error("the ids must hold as many image tokens as the images have cells");
  Tensor embeds = place(features[0].flatten(1, 2), is_image), deep;
  if (features.size() > 1) deep = place(features[1].flatten(2, 3), is_image);
  Tensor keys = at::zeros({cache[0], 1, 0, cache[1], cache[2]}, embeds.options()), values = keys;
  for (int64_t step = 0; step < count; ++step) {
    std::vector<Tensor> inputs{ids, mask, positions, embeds, keys, values};
    if (deep.defined()) inputs.push_back(deep);
    auto results = decoder.run(inputs);
    Tensor logits = results[0].select(1, -1).to(at::kFloat);
    Tensor of_seen = logits.gather(1, seen);
    logits.scatter_(1, seen, at::where(of_seen > 0, of_seen / penalty, of_seen * penalty));
    ids = logits.argmax(-1, true);
    seen = at::cat({seen, ids}, 1);
    keys = results[1], values = results[2];
    const int64_t token = ids.item<int64_t>();
    const bool is_last = step + 1 == count || std::find(ends.begin(), ends.end(), token) != ends.end();
    std::cout << token << (is_last ? '\n' : ' ') << std::flush;
    if (is_last) break;
    mask = at::cat({mask, at::ones_like(ids)}, 1);
    positions = (positions.max() + 1).expand({3, 1, 1}).contiguous();
    embeds = at::zeros_like(embeds.narrow(1, 0, 1));
    if (deep.defined()) deep = at::zeros_like(deep.narrow(2, 0, 1));
  }
}

int main(int argc, char** argv) try {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const bool is_generation = !words.empty() && words[0] == "generate";
  const size_t first_image = is_generation ? 4 : 3;
  if (words.size() <= first_image || (words[0] != "features" && !is_generation))
    throw std::runtime_error("expected: features ENGINE OUT IMAGE... or generate ENGINE IDS COUNT IMAGE...");
  const c10::InferenceMode no_grad;
  const auto settings = read_settings(words[1]);
  const at::Device device = check_device(settings);
  const Tensor frames = read_frames({words.begin() + first_image, words.end()}, settings);
  // For one thread at a time: else it waits for the device, which no capture allows.
  AOTIModelPackageLoader vision(words[1] + "/vision.pt2", "model", /*run_single_threaded=*/true);
  auto features = run(vision, {frames.to(device)});
  if (is_generation) {
    const Tensor ids = read_ids(words[2], integers(settings, "vocabulary_size")[0]);
    generate(words[1], settings, ids, read_count(words[3]), features);
    if (!std::cout) throw std::runtime_error("the tokens cannot be written");
  } else {
    write_floats(words[2], features[0][0].to(at::kCPU, at::kFloat).contiguous());
  }
  if (std::getenv("RUNNER_MAPS")) std::cerr << std::ifstream("/proc/self/maps").rdbuf();  // what is loaded, for tests
  return 0;
} catch (const std::exception& error) {
  std::cerr << "runner: " << error.what() << '\n';
  return 2;
}
