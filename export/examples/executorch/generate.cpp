// Continues a text with a byte-level model: generate MODEL.pte TEXT BYTES [KERNELS.so]. It takes the most probable byte
// each time. A model exported with kernels needs its libramnet_executorch.so.
#include <dlfcn.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>

using executorch::extension::Module;
using executorch::extension::TensorPtr;

static int failed(const char* what, executorch::runtime::Error error) {
  std::cerr << what << " failed: " << executorch::runtime::to_string(error) << "\n";
  return 1;
}

int main(int count, char** arguments) {
  if (count < 4 || count > 5) {
    std::cerr << "usage: " << arguments[0] << " MODEL.pte TEXT BYTES [KERNELS.so]\n";
    return 2;
  }
  const std::string text = arguments[2];
  if (text.empty()) {
    std::cerr << "the text is empty; give at least one byte to continue\n";
    return 2;
  }
  if (count == 5 && dlopen(arguments[4], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  // Both methods use one state, so they must share their memory.
  Module model(arguments[1], Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true);
  for (const char* method : {"forward", "reset"}) {
    const auto error = model.load_method(method);
    if (error != executorch::runtime::Error::Ok) return failed(method, error);
  }
  const auto reset = model.execute("reset");  // before another text; a model that was just loaded needs none
  if (!reset.ok()) return failed("reset", reset.error());

  int64_t id = 0;
  const TensorPtr ids = executorch::extension::from_blob(&id, {1, 1}, executorch::aten::ScalarType::Long);
  std::cout << text;
  const size_t last = text.size() + std::max(0, std::atoi(arguments[3]));
  for (size_t i = 0; i < last; i++) {
    if (i < text.size()) id = static_cast<unsigned char>(text[i]);
    else std::cout << static_cast<char>(id) << std::flush;
    const auto outputs = model.forward(ids);
    if (!outputs.ok()) return failed("a token", outputs.error());
    const auto& logits = outputs->at(0).toTensor();
    if (logits.numel() != 256) {
      std::cerr << "the model has " << logits.numel() << " tokens; text needs one of 256 bytes\n";
      return 2;
    }
    const float* const first = logits.const_data_ptr<float>();
    id = std::max_element(first, first + logits.numel()) - first;
  }
  std::cout << "\n";
}
