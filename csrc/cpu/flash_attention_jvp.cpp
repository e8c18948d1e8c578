// Attention and its tangents, a block of queries at a time over tiles of keys. Lanes are queries where scores are
// weighed, and columns where outputs are summed, so that no step needs sums across lanes or transposed keys. Scores and
// weights of a tile are computed once for the tangents of all probes.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <new>

#include "../common/softmax.h"
#include "instruction_set.h"
#include "operators.h"
#include "small_product.h"

namespace sparsecod::cpu {
namespace {

constexpr int64_t QUERIES = 64, KEYS = 48;  // of a block and of a tile, whose scores stay in the first cache
constexpr int64_t MAX_COLUMNS = 32;         // of products, on any instruction set; QUERIES are a multiple
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 18;  // fewer are not worth waking one

// A tensor [batch, head, row, column], perhaps with probes in front, contiguous in the last dimension. Strides are in
// elements.
template <typename T>
struct Rows {
  T* data;
  int64_t probe_stride, batch_stride, head_stride, row_stride;

  explicit Rows(const at::Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())),
        probe_stride(tensor.dim() == 5 ? tensor.stride(0) : 0),
        batch_stride(tensor.stride(-4)),
        head_stride(tensor.stride(-3)),
        row_stride(tensor.stride(-2)) {}

  SPARSECOD_INLINE T* row(int64_t batch, int64_t head, int64_t row, int64_t probe = 0) const {
    return data + probe * probe_stride + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

template <typename T>
struct Problem {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Rows<T> q, k, v, q_tangent, k_tangent, v_tangent, output, output_tangent;
  Real* log_sum_exp;
  int64_t probes, heads, group, queries, keys, head_dim;  // group: heads that share keys and values
  Real scale;
  bool causal;

  // How many queries from `first_query` on do not see a key.
  SPARSECOD_INLINE int64_t blind(int64_t key, int64_t first_query) const {
    if (!causal) return 0;
    return std::clamp<int64_t>(key - (keys - queries) - first_query, 0, QUERIES);
  }
};

// Cache-aligned arrays of one thread.
template <typename Real>
class Scratch {
 public:
  // Columns of outputs and values are padded to `pitch` with zeros, queries to QUERIES.
  Scratch(int64_t head_dim, int64_t pitch, int64_t probes)
      : pitch(pitch), q_size(head_dim * QUERIES), output_size(QUERIES * pitch) {
    Real** const arrays[] = {&q,     &q_tangent,     &k,           &k_tangent,    &v,      &v_tangent,
                             &score, &score_tangent, &tangent_sum, &tangent_mean, &factor, &shift,
                             &output, &output_tangent};
    const int64_t sizes[] = {q_size,         probes * q_size, KEYS * head_dim,  KEYS * head_dim,  KEYS * pitch, KEYS * pitch,
                             KEYS * QUERIES, KEYS * QUERIES,  probes * QUERIES, probes * QUERIES, QUERIES,      QUERIES,
                             output_size,    probes * output_size};
    static_assert(std::size(arrays) == std::size(sizes));
    constexpr int64_t LINE = 64 / sizeof(Real);
    int64_t total = LINE;
    for (int64_t size : sizes) total += (size + LINE - 1) / LINE * LINE;
    memory_.reset(new Real[total]());
    Real* next = memory_.get() + (-reinterpret_cast<uintptr_t>(memory_.get()) % 64) / sizeof(Real);
    for (size_t i = 0; i < std::size(arrays); next += (sizes[i++] + LINE - 1) / LINE * LINE) *arrays[i] = next;
  }

  Real *q, *q_tangent;                // [D, QUERIES], [P, D, QUERIES]
  Real *k, *k_tangent;                // [KEYS, D], the latter of one probe
  Real *v, *v_tangent;                // [KEYS, pitch], likewise
  Real *score, *score_tangent;        // [KEYS, QUERIES], likewise; then weights
  Real *tangent_sum, *tangent_mean;   // [P, QUERIES]: SoftmaxTangent
  Real *factor, *shift;               // [QUERIES]: SoftmaxTangent::Change
  Real *output, *output_tangent;      // [QUERIES, pitch], [P, QUERIES, pitch]
  const int64_t pitch, q_size, output_size;

 private:
  std::unique_ptr<Real[]> memory_;
};

// A block of queries of one head.
template <typename T>
struct AttendBlock {
  using Real = typename Problem<T>::Real;

  template <int LANES>
  static SPARSECOD_INLINE void run(const Problem<T>& problem, int64_t batch, int64_t head, int64_t first_query,
                                   Scratch<Real>& scratch) {
    constexpr int N = std::is_same_v<T, double> ? 1 : LANES;
    using V = Lanes<Real, N>;
    using Product = SmallProduct<Real, N>;
    static_assert(MAX_COLUMNS % Product::COLUMNS == 0 && QUERIES % MAX_COLUMNS == 0);
    const int64_t kv_head = head / problem.group, width = problem.head_dim, pitch = scratch.pitch;
    const int64_t queries = std::min(QUERIES, problem.queries - first_query);
    const int64_t seen = problem.causal ? first_query + queries + problem.keys - problem.queries : problem.keys;
    copy_transposed(scratch.q, problem.q.row(batch, head, first_query), problem.q.row_stride, queries, width);
    for (int64_t probe = 0; probe < problem.probes; ++probe) {
      copy_transposed(scratch.q_tangent + probe * scratch.q_size,
                      problem.q_tangent.row(batch, head, first_query, probe), problem.q_tangent.row_stride, queries,
                      width);
    }
    std::fill_n(scratch.output, scratch.output_size, Real{0});
    std::fill_n(scratch.output_tangent, problem.probes * scratch.output_size, Real{0});
    std::fill_n(scratch.tangent_sum, problem.probes * QUERIES, Real{0});
    std::fill_n(scratch.tangent_mean, problem.probes * QUERIES, Real{0});
    SoftmaxRow<V> softmax[QUERIES / N];
    for (SoftmaxRow<V>& row : softmax) row = SoftmaxRow<V>::empty();

    for (int64_t first_key = 0; first_key < seen; first_key += KEYS) {
      const int64_t keys = std::min(KEYS, seen - first_key);
      copy_rows(scratch.k, width, problem.k.row(batch, kv_head, first_key), problem.k.row_stride, keys, width);
      copy_rows(scratch.v, pitch, problem.v.row(batch, kv_head, first_key), problem.v.row_stride, keys, width);
      // Queries before `begin` see none of these keys.
      const int64_t begin = problem.blind(first_key, first_query) / Product::COLUMNS * Product::COLUMNS;
      const int64_t count = QUERIES - begin, rows = queries - begin;
      const Factors<Real> scores_of_keys = {scratch.k, width, 1, scratch.q + begin, QUERIES};
      Product::add(scratch.score + begin, QUERIES, {scores_of_keys}, keys, count, width, true);
      scale<N>(problem, scratch.score, begin, first_query, first_key, keys, -std::numeric_limits<Real>::infinity());
      for (int64_t query = begin; query < QUERIES; query += N) {
        Product::store(scratch.factor + query, weigh(softmax[query / N], scratch.score + query, keys));
      }

      const Factors<Real> weighted_values = {scratch.score + begin, 1, QUERIES, scratch.v, pitch};
      for (int64_t probe = 0; probe < problem.probes; ++probe) {
        copy_rows(scratch.k_tangent, width, problem.k_tangent.row(batch, kv_head, first_key, probe),
                  problem.k_tangent.row_stride, keys, width);
        copy_rows(scratch.v_tangent, pitch, problem.v_tangent.row(batch, kv_head, first_key, probe),
                  problem.v_tangent.row_stride, keys, width);
        Factors<Real> of_query_tangents = scores_of_keys, of_key_tangents = scores_of_keys;
        of_query_tangents.right = scratch.q_tangent + probe * scratch.q_size + begin;
        of_key_tangents.left = scratch.k_tangent;
        Product::add(scratch.score_tangent + begin, QUERIES, {of_query_tangents, of_key_tangents}, keys, count, width,
                     true);
        scale<N>(problem, scratch.score_tangent, begin, first_query, first_key, keys, Real{0});
        for (int64_t query = begin; query < QUERIES; query += N) {
          const int64_t at = probe * QUERIES + query;
          SoftmaxTangent<V> tangent = {Product::load(scratch.tangent_sum + at), Product::load(scratch.tangent_mean + at)};
          const V factor = Product::load(scratch.factor + query);
          const V shift = weigh_tangent(tangent, softmax[query / N], factor, scratch.score + query,
                                        scratch.score_tangent + query, keys);
          Product::store(scratch.shift + query, shift);
          Product::store(scratch.tangent_sum + at, tangent.sum);
          Product::store(scratch.tangent_mean + at, tangent.mean);
        }
        Real* const output_tangent = scratch.output_tangent + probe * scratch.output_size;
        for (int64_t query = begin; query < queries; ++query) {
          const V factor = V{} + scratch.factor[query], shift = V{} + scratch.shift[query];
          for (int64_t at = query * pitch; at < (query + 1) * pitch; at += N) {
            const typename SoftmaxTangent<V>::Change change = {factor, shift};
            const Dual<V> sums = {Product::load(scratch.output + at), Product::load(output_tangent + at)};
            Product::store(output_tangent + at, change(sums).tangent);
          }
        }
        Factors<Real> of_weight_tangents = weighted_values, of_value_tangents = weighted_values;
        of_weight_tangents.left = scratch.score_tangent + begin;
        of_value_tangents.right = scratch.v_tangent;
        Product::add(output_tangent + begin * pitch, pitch, {of_weight_tangents, of_value_tangents}, rows, pitch, keys,
                     false);
      }

      for (int64_t query = begin; query < queries; ++query) {
        const V factor = V{} + scratch.factor[query];
        for (int64_t at = query * pitch; at < (query + 1) * pitch; at += N) {
          Product::store(scratch.output + at, factor * Product::load(scratch.output + at));
        }
      }
      Product::add(scratch.output + begin * pitch, pitch, {weighted_values}, rows, pitch, keys, false);
    }
    write(problem, batch, head, first_query, queries, softmax, scratch);
  }

 private:
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

  // Scales the scores of queries from `begin` on; those of keys that a query does not see become `hidden`.
  template <int N>
  static SPARSECOD_INLINE void scale(const Problem<T>& problem, Real* scores, int64_t begin, int64_t first_query,
                                     int64_t first_key, int64_t keys, Real hidden) {
    using Product = SmallProduct<Real, N>;
    for (int64_t key = 0; key < keys; ++key, scores += QUERIES) {
      for (int64_t i = begin; i < QUERIES; i += N) Product::store(scores + i, Product::load(scores + i) * problem.scale);
      std::fill_n(scores + begin, problem.blind(first_key + key, first_query) - begin, hidden);
    }
  }

  // Turns scores of N queries into weights, and returns the factor by which earlier ones shrink.
  template <typename V>
  static SPARSECOD_INLINE V weigh(SoftmaxRow<V>& row, Real* score, int64_t keys) {
    using Product = SmallProduct<Real, sizeof(V) / sizeof(Real)>;
    V largest = Product::load(score);
    for (int64_t key = 1; key < keys; ++key) largest = larger(Product::load(score + key * QUERIES), largest);
    const V factor = row.raise(largest);
    V sum{};
    for (int64_t at = 0; at < keys * QUERIES; at += QUERIES) {
      const V weight = row.weigh(Product::load(score + at));
      Product::store(score + at, weight);
      sum += weight;
    }
    row.add(factor, sum);
    return factor;
  }

  // Turns tangents of scores of N queries into tangents of weights, and returns by how much what was accumulated shifts.
  template <typename V>
  static SPARSECOD_INLINE V weigh_tangent(SoftmaxTangent<V>& tangent, const SoftmaxRow<V>& row, V factor,
                                          const Real* weight, Real* score_tangent, int64_t keys) {
    using Product = SmallProduct<Real, sizeof(V) / sizeof(Real)>;
    V sum{};
    for (int64_t at = 0; at < keys * QUERIES; at += QUERIES) {
      sum += Product::load(weight + at) * Product::load(score_tangent + at);
    }
    const auto change = tangent.add(row, factor, sum);
    for (int64_t at = 0; at < keys * QUERIES; at += QUERIES) {
      Product::store(score_tangent + at, tangent.weigh(Product::load(weight + at), Product::load(score_tangent + at)));
    }
    return change.shift;
  }

  static SPARSECOD_INLINE void write_row(T* to, const SoftmaxRow<Real>& row, const Real* sums, int64_t width) {
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<T>(row.output(sums[i]));
  }

  template <typename V>
  static SPARSECOD_INLINE void write(const Problem<T>& problem, int64_t batch, int64_t head, int64_t first_query,
                                     int64_t queries, const SoftmaxRow<V>* softmax, const Scratch<Real>& scratch) {
    constexpr int64_t N = sizeof(V) / sizeof(Real);
    for (int64_t query = 0; query < queries; ++query) {
      Real max[N], sum[N];
      std::memcpy(max, &softmax[query / N].max, sizeof(max));
      std::memcpy(sum, &softmax[query / N].sum, sizeof(sum));
      const SoftmaxRow<Real> row = {max[query % N], sum[query % N]};
      const Real* const sums = scratch.output + query * scratch.pitch;
      const Real* const tangent_sums = scratch.output_tangent + query * scratch.pitch;
      write_row(problem.output.row(batch, head, first_query + query), row, sums, problem.head_dim);
      for (int64_t probe = 0; probe < problem.probes; ++probe) {
        write_row(problem.output_tangent.row(batch, head, first_query + query, probe), row,
                  tangent_sums + probe * scratch.output_size, problem.head_dim);
      }
      problem.log_sum_exp[(batch * problem.heads + head) * problem.queries + first_query + query] = row.log_sum_exp();
    }
  }
};

}  // namespace

void flash_attention_jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
                         const at::Tensor& k_tangent, const at::Tensor& v_tangent, double scale, bool causal,
                         const at::Tensor& output, const at::Tensor& output_tangent, const at::Tensor& log_sum_exp) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "flash_attention_jvp", [&] {
    using Real = typename Problem<scalar_t>::Real;
    using Tensor = Rows<scalar_t>;
    static const auto attend = best_instruction_set<AttendBlock<scalar_t>, const Problem<scalar_t>&, int64_t, int64_t,
                                                    int64_t, Scratch<Real>&>();
    const Problem<scalar_t> problem = {Tensor(q),
                                       Tensor(k),
                                       Tensor(v),
                                       Tensor(q_tangent),
                                       Tensor(k_tangent),
                                       Tensor(v_tangent),
                                       Tensor(output),
                                       Tensor(output_tangent),
                                       log_sum_exp.mutable_data_ptr<Real>(),
                                       q_tangent.size(0),
                                       q.size(1),
                                       q.size(1) / k.size(1),
                                       q.size(2),
                                       k.size(2),
                                       q.size(3),
                                       static_cast<Real>(scale),
                                       causal};
    const int64_t blocks = at::divup(problem.queries, QUERIES), width = problem.head_dim;
    const int64_t pitch = at::divup(width, MAX_COLUMNS) * MAX_COLUMNS;
    const int64_t products = std::min(QUERIES, problem.queries) * problem.keys * width * problem.probes;
    const int64_t grain = at::divup(PRODUCTS_PER_THREAD, products);
    at::parallel_for(0, q.size(0) * problem.heads * blocks, grain, [&](int64_t begin, int64_t end) {
      Scratch<Real> scratch(width, pitch, problem.probes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks;
        attend(problem, head / problem.heads, head % problem.heads, i % blocks * QUERIES, scratch);
      }
    });
  });
}

}  // namespace sparsecod::cpu
