// openvino_ir FILE OUTPUT DEVICE [KEY=VALUE …]: an IR in OpenVINO's C++ library, compiled with those settings.
#include <openvino/openvino.hpp>
#include "batches.h"

int main(int argc, const char* argv[]) {
  if (argc < 4) return 2;
  const std::string output = argv[2];
  ov::AnyMap settings;
  for (int place = 4; place < argc; ++place) {
    const std::string setting = argv[place];
    const size_t equals = setting.find('=');
    settings[setting.substr(0, equals)] = setting.substr(equals + 1);
  }
  ov::Core core;
  ov::InferRequest request = core.compile_model(argv[1], argv[3], settings).create_infer_request();
  std::cout << "{\"output\": \"" << output << "\", \"answers\": [";
  bool first = true;
  for (Batch& batch : read_batches()) {
    const ov::Shape shape(batch.shape.begin(), batch.shape.end());
    auto tensor = [&](std::vector<int64_t>& values) { return ov::Tensor(ov::element::i64, shape, values.data()); };
    request.set_tensor("input_ids", tensor(batch.ids));
    request.set_tensor("attention_mask", tensor(batch.mask));
    request.set_tensor("token_type_ids", tensor(batch.types));
    request.infer();
    const ov::Tensor values = request.get_tensor(output);
    write_answer(values.get_shape(), values.data<float>(), first);
    first = false;
  }
  std::cout << "]}" << std::endl;
}
