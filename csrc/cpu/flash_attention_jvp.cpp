// Attention and its tangent, a block of queries at a time over tiles of keys. Lanes are queries where scores are
// weighed, and columns where outputs are summed, so that no step needs sums across lanes or transposed keys.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string>

#include "../common/softmax.h"
#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int64_t QUERIES = 96, KEYS = 48;  // of a block and of a tile; scratch for a head of 128 takes 300 KB
constexpr int64_t MAX_DEPTH = 64;                 // products added up in one chain, before the sum joins others
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 18;  // fewer are not worth waking one

// A tensor [batch, head, row, column], contiguous in the last dimension. Strides are in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride, head_stride, row_stride;

  explicit Rows(const at::Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())),
        batch_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        row_stride(tensor.stride(2)) {}

  SPARSECOD_INLINE T* row(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

template <typename T>
struct Problem {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Rows<T> q, k, v, q_tangent, k_tangent, v_tangent, output, output_tangent;
  Real* log_sum_exp;
  int64_t heads, group, queries, keys, head_dim;  // group: heads that share keys and values
  Real scale;
  bool causal;
};

// Cache-aligned arrays of one thread.
template <typename Real>
class Scratch {
 public:
  // Columns of outputs and values are padded to `pitch` with zeros, queries to QUERIES.
  Scratch(int64_t head_dim, int64_t pitch) : pitch(pitch) {
    Real** const arrays[] = {&q, &q_tangent, &k, &k_tangent, &v, &v_tangent, &score, &score_tangent, &output,
                             &output_tangent};
    const int64_t sizes[] = {QUERIES * head_dim, QUERIES * head_dim, KEYS * head_dim, KEYS * head_dim, KEYS * pitch,
                             KEYS * pitch,       KEYS * QUERIES,     KEYS * QUERIES,  QUERIES * pitch, QUERIES * pitch};
    constexpr int64_t LINE = 64 / sizeof(Real);
    int64_t total = LINE;
    for (int64_t size : sizes) total += (size + LINE - 1) / LINE * LINE;
    memory_.reset(new Real[total]());
    Real* next = memory_.get() + (-reinterpret_cast<uintptr_t>(memory_.get()) % 64) / sizeof(Real);
    for (size_t i = 0; i < std::size(arrays); next += (sizes[i++] + LINE - 1) / LINE * LINE) *arrays[i] = next;
  }

  Real *q, *q_tangent;            // [D, QUERIES]
  Real *k, *k_tangent;            // [KEYS, D]
  Real *v, *v_tangent;            // [KEYS, pitch]
  Real *score, *score_tangent;    // [KEYS, QUERIES]; then weights
  Real *output, *output_tangent;  // [QUERIES, pitch]
  const int64_t pitch;

 private:
  std::unique_ptr<Real[]> memory_;
};

// Compiled for elements of type T and N lanes.
template <typename T, int N>
struct Kernel {
  using Real = typename Problem<T>::Real;
  using V = Lanes<Real, N>;
  static constexpr int64_t COLUMNS = 2 * N;  // of a product at a time, by 6 rows: as many sums as registers hold
  static_assert(QUERIES % COLUMNS == 0);

  static SPARSECOD_INLINE V load(const Real* from) {
    V pack;
    std::memcpy(&pack, from, sizeof(pack));
    return pack;
  }
  static SPARSECOD_INLINE void store(Real* to, V pack) { std::memcpy(to, &pack, sizeof(pack)); }

  // A [rows, depth], of any strides.
  struct Left {
    const Real* data;
    int64_t row_stride, step;

    SPARSECOD_INLINE Left from(int64_t row, int64_t column) const {
      return {data + row * row_stride + column * step, row_stride, step};
    }
  };

  template <int ROWS>
  static SPARSECOD_INLINE void add_product_of_rows(Real* c, int64_t c_pitch, Left a, const Real* b, int64_t b_pitch,
                                                   int64_t depth) {
    V sums[ROWS][2]{};
    for (int64_t i = 0; i < depth; ++i) {
      const V left = load(b + i * b_pitch), right = load(b + i * b_pitch + N);
      for (int row = 0; row < ROWS; ++row) {
        const V factor = V{} + a.data[row * a.row_stride + i * a.step];
        sums[row][0] += factor * left;
        sums[row][1] += factor * right;
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      Real* to = c + row * c_pitch;
      store(to, load(to) + sums[row][0]);
      store(to + N, load(to + N) + sums[row][1]);
    }
  }

  // C [rows, columns] += A [rows, depth] B [depth, columns]; columns are a multiple of COLUMNS.
  static SPARSECOD_INLINE void add_product(Real* c, int64_t c_pitch, Left a, const Real* b, int64_t b_pitch,
                                           int64_t rows, int64_t columns, int64_t depth) {
    for (int64_t first = 0; first < depth; first += MAX_DEPTH) {
      const int64_t deep = std::min(MAX_DEPTH, depth - first);
      for (int64_t column = 0; column < columns; column += COLUMNS) {
        const Real* const right = b + first * b_pitch + column;
        int64_t row = 0;
        for (; row + 6 <= rows; row += 6) {
          add_product_of_rows<6>(c + row * c_pitch + column, c_pitch, a.from(row, first), right, b_pitch, deep);
        }
        for (; row < rows; ++row) {
          add_product_of_rows<1>(c + row * c_pitch + column, c_pitch, a.from(row, first), right, b_pitch, deep);
        }
      }
    }
  }

  static SPARSECOD_INLINE void copy_rows(Real* to, int64_t pitch, const T* from, int64_t row_stride, int64_t rows,
                                         int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < width; ++i) to[row * pitch + i] = static_cast<Real>(from[row * row_stride + i]);
    }
  }

  static SPARSECOD_INLINE void copy_transposed(Real* to, const T* from, int64_t row_stride, int64_t rows,
                                               int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t row = 0; row < rows; ++row) to[i * QUERIES + row] = static_cast<Real>(from[row * row_stride + i]);
      std::fill(to + i * QUERIES + rows, to + (i + 1) * QUERIES, Real{0});
    }
  }

  // Turns scores of N queries into weights, and returns what becomes of what was accumulated.
  static SPARSECOD_INLINE typename SoftmaxRow<V>::Change weigh(SoftmaxRow<V>& row, Real* score, Real* score_tangent,
                                                               int64_t keys) {
    V largest = load(score);
    for (int64_t key = 1; key < keys; ++key) largest = larger(load(score + key * QUERIES), largest);
    const V factor = row.raise(largest);
    Dual<V> sums{};
    for (int64_t at = 0; at < keys * QUERIES; at += QUERIES) {
      const V weight = row.weigh(load(score + at));
      store(score + at, weight);
      sums = sums + Dual<V>{weight, weight * load(score_tangent + at)};
    }
    const auto change = row.add(factor, sums);
    for (int64_t at = 0; at < keys * QUERIES; at += QUERIES) {
      store(score_tangent + at, row.weigh_tangent(load(score + at), load(score_tangent + at)));
    }
    return change;
  }

  // The first query of a block that sees a key.
  static SPARSECOD_INLINE int64_t first_seeing(const Problem<T>& problem, int64_t key, int64_t first_query) {
    if (!problem.causal) return 0;
    return std::clamp<int64_t>(key - (problem.keys - problem.queries) - first_query, 0, QUERIES);
  }

  static SPARSECOD_INLINE void run(const Problem<T>& problem, int64_t batch, int64_t head, int64_t first_query,
                                   Scratch<Real>& scratch) {
    const int64_t kv_head = head / problem.group, width = problem.head_dim, pitch = scratch.pitch;
    const int64_t queries = std::min(QUERIES, problem.queries - first_query);
    const int64_t seen = problem.causal ? first_query + queries + problem.keys - problem.queries : problem.keys;
    copy_transposed(scratch.q, problem.q.row(batch, head, first_query), problem.q.row_stride, queries, width);
    copy_transposed(scratch.q_tangent, problem.q_tangent.row(batch, head, first_query), problem.q_tangent.row_stride,
                    queries, width);
    std::fill(scratch.output, scratch.output + QUERIES * pitch, Real{0});
    std::fill(scratch.output_tangent, scratch.output_tangent + QUERIES * pitch, Real{0});
    SoftmaxRow<V> softmax[QUERIES / N];
    for (SoftmaxRow<V>& row : softmax) row = SoftmaxRow<V>::empty();

    for (int64_t first_key = 0; first_key < seen; first_key += KEYS) {
      const int64_t keys = std::min(KEYS, seen - first_key);
      copy_rows(scratch.k, width, problem.k.row(batch, kv_head, first_key), problem.k.row_stride, keys, width);
      copy_rows(scratch.k_tangent, width, problem.k_tangent.row(batch, kv_head, first_key),
                problem.k_tangent.row_stride, keys, width);
      copy_rows(scratch.v, pitch, problem.v.row(batch, kv_head, first_key), problem.v.row_stride, keys, width);
      copy_rows(scratch.v_tangent, pitch, problem.v_tangent.row(batch, kv_head, first_key),
                problem.v_tangent.row_stride, keys, width);

      const int64_t begin = first_seeing(problem, first_key, first_query) / COLUMNS * COLUMNS, count = QUERIES - begin;
      Real *const score = scratch.score + begin, *const score_tangent = scratch.score_tangent + begin;
      std::fill(scratch.score, scratch.score + keys * QUERIES, Real{0});
      std::fill(scratch.score_tangent, scratch.score_tangent + keys * QUERIES, Real{0});
      const Left k = {scratch.k, width, 1}, k_tangent = {scratch.k_tangent, width, 1};
      add_product(score, QUERIES, k, scratch.q + begin, QUERIES, keys, count, width);
      add_product(score_tangent, QUERIES, k, scratch.q_tangent + begin, QUERIES, keys, count, width);
      add_product(score_tangent, QUERIES, k_tangent, scratch.q + begin, QUERIES, keys, count, width);
      for (int64_t i = 0; i < keys * QUERIES; ++i) {
        scratch.score[i] *= problem.scale;
        scratch.score_tangent[i] *= problem.scale;
      }
      for (int64_t key = 0; key < keys; ++key) {
        const int64_t unseen = first_seeing(problem, first_key + key, first_query) - begin;
        std::fill(score + key * QUERIES, score + key * QUERIES + unseen, -std::numeric_limits<Real>::infinity());
        std::fill(score_tangent + key * QUERIES, score_tangent + key * QUERIES + unseen, Real{0});
      }

      for (int64_t query = begin; query < QUERIES; query += N) {
        const auto change = weigh(softmax[query / N], scratch.score + query, scratch.score_tangent + query, keys);
        Real factor[N], shift[N];
        store(factor, change.factor);
        store(shift, change.shift);
        for (int64_t i = 0; i < N; ++i) {
          const typename SoftmaxRow<Real>::Change change_row = {factor[i], shift[i]};
          for (int64_t at = (query + i) * pitch; at < (query + i + 1) * pitch; ++at) {
            const Dual<Real> changed = change_row({scratch.output[at], scratch.output_tangent[at]});
            scratch.output[at] = changed.value;
            scratch.output_tangent[at] = changed.tangent;
          }
        }
      }

      const Left weight = {score, 1, QUERIES}, weight_tangent = {score_tangent, 1, QUERIES};
      const int64_t rows = queries - begin;
      Real* const output = scratch.output + begin * pitch;
      Real* const output_tangent = scratch.output_tangent + begin * pitch;
      add_product(output, pitch, weight, scratch.v, pitch, rows, pitch, keys);
      add_product(output_tangent, pitch, weight_tangent, scratch.v, pitch, rows, pitch, keys);
      add_product(output_tangent, pitch, weight, scratch.v_tangent, pitch, rows, pitch, keys);
    }

    for (int64_t query = 0; query < queries; ++query) {
      const SoftmaxRow<V>& lanes = softmax[query / N];
      Real max[N], sum[N];
      store(max, lanes.max);
      store(sum, lanes.sum);
      const SoftmaxRow<Real> row = {max[query % N], sum[query % N], 0, 0};
      T* const to = problem.output.row(batch, head, first_query + query);
      T* const tangent_to = problem.output_tangent.row(batch, head, first_query + query);
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = query * pitch + i;
        const Dual<Real> normalised = row.output({scratch.output[at], scratch.output_tangent[at]});
        to[i] = static_cast<T>(normalised.value);
        tangent_to[i] = static_cast<T>(normalised.tangent);
      }
      problem.log_sum_exp[(batch * problem.heads + head) * problem.queries + first_query + query] = row.log_sum_exp();
    }
  }
};

// Compiled once per instruction set. PyTorch's own choice (ATEN_CPU_CAPABILITY) says which one runs.
template <typename T>
using Attend = void (*)(const Problem<T>& problem, int64_t batch, int64_t head, int64_t first_query,
                        Scratch<typename Problem<T>::Real>& scratch);

constexpr int64_t MAX_COLUMNS = 32;  // of any instruction set

template <typename T, int LANES>
constexpr int lanes_of = std::is_same_v<T, double> ? 1 : LANES;

template <typename T>
void attend_baseline(const Problem<T>& problem, int64_t batch, int64_t head, int64_t first_query,
                     Scratch<typename Problem<T>::Real>& scratch) {
  Kernel<T, lanes_of<T, 4>>::run(problem, batch, head, first_query, scratch);
}

#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma"))) void attend_avx2(const Problem<T>& problem, int64_t batch, int64_t head,
                                                     int64_t first_query, Scratch<typename Problem<T>::Real>& scratch) {
  Kernel<T, lanes_of<T, 8>>::run(problem, batch, head, first_query, scratch);
}

template <typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void attend_avx512(
    const Problem<T>& problem, int64_t batch, int64_t head, int64_t first_query,
    Scratch<typename Problem<T>::Real>& scratch) {
  Kernel<T, lanes_of<T, 16>>::run(problem, batch, head, first_query, scratch);
}
#endif

template <typename T>
Attend<T> best_attend() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return attend_avx512<T>;
  if (capability == "AVX2") return attend_avx2<T>;
#endif
  return attend_baseline<T>;
}

}  // namespace

void attend_one(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
                         const at::Tensor& k_tangent, const at::Tensor& v_tangent, double scale, bool causal,
                         const at::Tensor& output, const at::Tensor& output_tangent, const at::Tensor& log_sum_exp) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "flash_attention_jvp", [&] {
    using Real = typename Problem<scalar_t>::Real;
    using Tensor = Rows<scalar_t>;
    static const Attend<scalar_t> attend = best_attend<scalar_t>();
    const Problem<scalar_t> problem = {Tensor(q),
                                       Tensor(k),
                                       Tensor(v),
                                       Tensor(q_tangent),
                                       Tensor(k_tangent),
                                       Tensor(v_tangent),
                                       Tensor(output),
                                       Tensor(output_tangent),
                                       log_sum_exp.mutable_data_ptr<Real>(),
                                       q.size(1),
                                       q.size(1) / k.size(1),
                                       q.size(2),
                                       k.size(2),
                                       q.size(3),
                                       static_cast<Real>(scale),
                                       causal};
    const int64_t blocks = at::divup(problem.queries, QUERIES), width = problem.head_dim;
    const int64_t pitch = at::divup(width, MAX_COLUMNS) * MAX_COLUMNS;
    const int64_t grain = at::divup(PRODUCTS_PER_THREAD, std::min(QUERIES, problem.queries) * problem.keys * width);
    at::parallel_for(0, q.size(0) * problem.heads * blocks, grain, [&](int64_t begin, int64_t end) {
      Scratch<Real> scratch(width, pitch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks;
        attend(problem, head / problem.heads, head % problem.heads, i % blocks * QUERIES, scratch);
      }
    });
  });
}

void flash_attention_jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
                         const at::Tensor& k_tangent, const at::Tensor& v_tangent, double scale, bool causal,
                         const at::Tensor& output, const at::Tensor& output_tangent, const at::Tensor& log_sum_exp) {
  for (int64_t probe = 0; probe < q_tangent.size(0); ++probe) {
    attend_one(q, k, v, q_tangent[probe], k_tangent[probe], v_tangent[probe], scale, causal, output,
               output_tangent[probe], log_sum_exp);
  }
}

}  // namespace sparsecod::cpu
