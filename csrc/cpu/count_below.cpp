// Elements below thresholds, in all tensors of a list: integers compared in lanes, with magnitudes as in thresholds.h.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/thresholds.h"
#include "instruction_set.h"
#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int GROUP = 4;                   // thresholds in one sweep; more would not fit in AVX2's registers
constexpr int64_t BLOCK_BYTES = 16 << 10;  // in the first cache for the second sweep; 16-bit lanes count all its packs
constexpr int64_t CHUNK_BYTES = 256 << 10;
constexpr int64_t CHUNKS_PER_THREAD = 2;  // fewer are not worth waking one

using Counts = std::array<int64_t, MAX_THRESHOLDS>;
using ThresholdBits = std::array<uint64_t, MAX_THRESHOLDS>;  // 0, below which nothing is, from num_thresholds on

// Adds to counts[0 .. GROUP - 1] how many of `size` elements lie below the thresholds, as integers without a sign.
template <typename Bits, int N>
SPARSECOD_INLINE void count_block(int64_t* counts, const Bits* elements, int64_t size, const uint64_t* not_below) {
  using Pack = Lanes<Bits, N>;
  constexpr Bits WITHOUT_SIGN = std::numeric_limits<Bits>::max();
  Pack bound[GROUP], below[GROUP];
  for (int i = 0; i < GROUP; ++i) {
    bound[i] = Pack{} + static_cast<Bits>(not_below[i]);
    below[i] = Pack{};
  }
  const auto count = [&](Pack pack) __attribute__((always_inline)) {
    const Pack magnitude = pack & WITHOUT_SIGN;
    for (int i = 0; i < GROUP; ++i) below[i] -= magnitude < bound[i];  // true is -1
  };
  int64_t at = 0;
  for (; at + N <= size; at += N) {
    Pack pack;
    std::memcpy(&pack, elements + at, sizeof(pack));
    count(pack);
  }
  if (at < size) {
    Bits rest[N];
    std::fill_n(rest, N, WITHOUT_SIGN);  // NaN, not below anything
    std::memcpy(rest, elements + at, (size - at) * sizeof(Bits));
    Pack pack;
    std::memcpy(&pack, rest, sizeof(pack));
    count(pack);
  }
  for (int i = 0; i < GROUP; ++i) {
    Bits lanes[N];
    std::memcpy(lanes, &below[i], sizeof(lanes));
    for (Bits lane : lanes) counts[i] += lane;
  }
}

template <typename Bits>
struct CountChunk {
  template <int N>
  static SPARSECOD_INLINE void run(Counts& counts, const void* elements, int64_t size, const ThresholdBits& not_below,
                                   int num_thresholds) {
    constexpr int64_t PER_BLOCK = BLOCK_BYTES / sizeof(Bits);
    static_assert(BLOCK_BYTES / 16 < std::numeric_limits<int16_t>::max());
    const Bits* bits = static_cast<const Bits*>(elements);
    for (int64_t at = 0; at < size; at += PER_BLOCK) {
      const int64_t in_block = std::min(PER_BLOCK, size - at);
      for (int group = 0; group < num_thresholds; group += GROUP) {
        count_block<Bits, N * sizeof(float) / sizeof(Bits)>(counts.data() + group, bits + at, in_block,
                                                            not_below.data() + group);
      }
    }
  }
};

using Count = void (*)(Counts& counts, const void* elements, int64_t size, const ThresholdBits& not_below,
                       int num_thresholds);

template <typename Bits>
Count best_count() {
  return best_instruction_set<CountChunk<Bits>, Counts&, const void*, int64_t, const ThresholdBits&, int>();
}

struct Format {
  FloatFormat format;
  Count count;
};

Format format_of(at::ScalarType dtype) {
  static const Count count_16_bits = best_count<int16_t>();
  static const Count count_32_bits = best_count<int32_t>();
  static const Count count_64_bits = best_count<int64_t>();
  switch (dtype) {
    case at::kHalf: return {FLOAT16_FORMAT, count_16_bits};
    case at::kBFloat16: return {BFLOAT16_FORMAT, count_16_bits};
    case at::kFloat: return {FLOAT32_FORMAT, count_32_bits};
    case at::kDouble: return {FLOAT64_FORMAT, count_64_bits};
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype");
  }
}

struct Chunk {
  const char* elements;
  int64_t size, tensor;
  Count count;
  ThresholdBits not_below;
  Counts counts;
};

}  // namespace

void count_below(at::TensorList tensors, at::ArrayRef<double> thresholds, const at::Tensor& counts) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    const Format format = format_of(tensor.scalar_type());
    ThresholdBits not_below{};
    for (size_t j = 0; j < thresholds.size(); ++j) not_below[j] = bits_not_below(thresholds[j], format.format);
    const char* elements = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t bytes = tensor.element_size(), per_chunk = CHUNK_BYTES / bytes;
    for (int64_t at = 0; at < tensor.numel(); at += per_chunk) {
      chunks.push_back({elements + at * bytes, std::min(per_chunk, tensor.numel() - at), static_cast<int64_t>(i),
                        format.count, not_below, {}});
    }
  }
  at::parallel_for(0, chunks.size(), CHUNKS_PER_THREAD, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Chunk& chunk = chunks[i];
      chunk.count(chunk.counts, chunk.elements, chunk.size, chunk.not_below, thresholds.size());
    }
  });
  int64_t* totals = counts.mutable_data_ptr<int64_t>();
  for (const Chunk& chunk : chunks) {
    for (size_t j = 0; j < thresholds.size(); ++j) totals[chunk.tensor * thresholds.size() + j] += chunk.counts[j];
  }
}

}  // namespace sparsecod::cpu
