// torchscript FILE OUTPUT: a TorchScript file in torch's C++ library.
#include <torch/script.h>
#include "batches.h"

int main(int argc, const char* argv[]) {
  if (argc != 3) return 2;
  const std::string output = argv[2];
  torch::jit::Module model = torch::jit::load(argv[1]);
  torch::NoGradGuard guard;
  std::cout << "{\"output\": \"" << output << "\", \"answers\": [";
  bool first = true;
  for (Batch& batch : read_batches()) {
    auto tensor = [&](std::vector<int64_t>& values) { return torch::from_blob(values.data(), batch.shape, torch::kInt64); };
    auto outputs = model.forward({tensor(batch.ids), tensor(batch.mask), tensor(batch.types)}).toGenericDict();
    torch::Tensor values = outputs.at(output).toTensor().contiguous();
    write_answer(values.sizes(), values.data_ptr<float>(), first);
    first = false;
  }
  std::cout << "]}" << std::endl;
}
