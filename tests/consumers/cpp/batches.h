// What both programs read and write: batches of int64 inputs as text on stdin (count; then batch, sequence, and input_ids,
// attention_mask and token_type_ids of each), answers as one line of JSON on stdout.
#pragma once
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <string>
#include <vector>

struct Batch {
  std::vector<int64_t> shape, ids, mask, types;
};

inline std::vector<Batch> read_batches() {
  size_t count;
  std::cin >> count;
  std::vector<Batch> batches(count);
  for (Batch& batch : batches) {
    batch.shape.resize(2);
    std::cin >> batch.shape[0] >> batch.shape[1];
    for (auto* values : {&batch.ids, &batch.mask, &batch.types}) {
      values->resize(batch.shape[0] * batch.shape[1]);
      for (int64_t& value : *values) std::cin >> value;
    }
  }
  return batches;
}

template <typename Shape>
void write_answer(const Shape& shape, const float* values, bool first) {
  std::cout << (first ? "" : ", ") << "{\"shape\": [";
  size_t size = 1;
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    std::cout << (axis ? ", " : "") << shape[axis];
    size *= shape[axis];
  }
  std::cout << "], \"values\": [" << std::setprecision(9);
  for (size_t place = 0; place < size; ++place) std::cout << (place ? ", " : "") << values[place];
  std::cout << "]}";
}
