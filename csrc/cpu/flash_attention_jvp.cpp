// Attention and its tangents, a block of queries at a time over tiles of keys. Lanes are queries where scores are
// weighed, and columns where outputs are summed, so that no step needs sums across lanes or transposed keys. Scores and
// weights of a tile are computed once for the tangents of all probes.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "../common/softmax.h"
#include "flash_attention_problem.h"
#include "instruction_set.h"
#include "operators.h"
#include "small_product.h"

namespace sparsecod::cpu {
namespace {

using namespace flash_attention;

constexpr int64_t MAX_COLUMNS = 32;               // of products, on any instruction set; QUERIES are a multiple
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 18;  // fewer are not worth waking one

// Keys that a block of queries looks at together; queries of the block before `begin` see none of them.
struct Tile {
  int64_t first_key, keys, begin;
};

// A block of queries of one head, in lanes of N.
template <typename T, int N>
class Block {
 public:
  using Real = typename Problem<T>::Real;

  SPARSECOD_INLINE Block(const Problem<T>& problem, Scratch<Real>& scratch, int64_t batch, int64_t head,
                         int64_t first_query)
      : problem_(problem),
        scratch_(scratch),
        batch_(batch),
        head_(head),
        kv_head_(head / problem.group),
        first_query_(first_query),
        queries_(std::min(QUERIES, problem.queries - first_query)) {}

  SPARSECOD_INLINE void run() {
    start();
    const int64_t seen = problem_.causal ? first_query_ + queries_ + problem_.keys - problem_.queries : problem_.keys;
    for (int64_t first_key = 0; first_key < seen; first_key += KEYS) {
      const Tile tile = {first_key, std::min(KEYS, seen - first_key),
                         problem_.blind(first_key, first_query_) / Product::COLUMNS * Product::COLUMNS};
      weigh(tile);
      if (problem_.shared.probes > 0) add_scales(tile);
      for (int64_t probe = 0; probe < problem_.probes; ++probe) {
        weigh_tangent(tile, probe);
        add_tangent(tile, probe);
      }
      add(tile);  // last: tangents shift by what was accumulated before
    }
    write();
  }

 private:
  using V = Lanes<Real, N>;
  using Product = SmallProduct<Real, N>;
  static_assert(MAX_COLUMNS % Product::COLUMNS == 0 && QUERIES % MAX_COLUMNS == 0);

  const Problem<T>& problem_;
  Scratch<Real>& scratch_;
  const int64_t batch_, head_, kv_head_, first_query_, queries_;
  SoftmaxRow<V> softmax_[QUERIES / N];

  SPARSECOD_INLINE void start() {
    copy_queries(scratch_.q, problem_.q, 0);
    std::fill_n(scratch_.output, scratch_.output_size, Real{0});
    std::fill_n(scratch_.scale_sum, QUERIES, Real{0});
    for (SoftmaxRow<V>& row : softmax_) row = SoftmaxRow<V>::empty();
    for (int64_t probe = 0; probe < problem_.probes; ++probe) {
      Real* const q_tangent = scratch_.q_tangent + probe * scratch_.q_size;
      if (is_shared(probe)) {
        make_shared_queries(q_tangent, probe);
      } else {
        copy_queries(q_tangent, problem_.q_tangent, probe - problem_.shared.probes);
      }
    }
    std::fill_n(scratch_.output_tangent, problem_.probes * scratch_.output_size, Real{0});
    std::fill_n(scratch_.tangent_sum, problem_.probes * QUERIES, Real{0});
    std::fill_n(scratch_.tangent_mean, problem_.probes * QUERIES, Real{0});
  }

  SPARSECOD_INLINE void copy_queries(Real* to, const Rows<T>& tensor, int64_t probe) const {
    const T* const from = tensor.row(batch_, head_, first_query_, probe);
    for (int64_t i = 0; i < problem_.head_dim; ++i, to += QUERIES) {
      for (int64_t row = 0; row < queries_; ++row) to[row] = static_cast<Real>(from[row * tensor.row_stride + i]);
      std::fill(to + queries_, to + QUERIES, Real{0});
    }
  }

  SPARSECOD_INLINE bool is_shared(int64_t probe) const { return probe < problem_.shared.probes; }

  // Rates of a shared probe from `token` on.
  SPARSECOD_INLINE const Real* rates(int64_t probe, int64_t token) const {
    return problem_.shared.rate + (probe * problem_.batch + batch_) * problem_.keys + token;
  }

  SPARSECOD_INLINE const Real* scales(int64_t token) const {
    return problem_.shared.scale + batch_ * problem_.keys + token;
  }

  SPARSECOD_INLINE void make_shared_queries(Real* to, int64_t probe) const {
    const Rows<T>& offsets = problem_.shared.q_offset;
    const T* const from = offsets.row(0, head_, first_query_, probe);
    const Real *const scale = scales(first_query_), *const rate = rates(probe, first_query_), *q = scratch_.q;
    for (int64_t i = 0; i < problem_.head_dim; ++i, to += QUERIES, q += QUERIES) {
      for (int64_t row = 0; row < queries_; ++row) {
        to[row] = scale[row] * static_cast<Real>(from[row * offsets.row_stride + i]) + rate[row] * q[row];
      }
      std::fill(to + queries_, to + QUERIES, Real{0});
    }
  }

  SPARSECOD_INLINE void make_shared_keys(Real* to, const Tile& tile, int64_t probe) const {
    const Rows<T>& offsets = problem_.shared.k_offset;
    const T* from = offsets.row(0, kv_head_, tile.first_key, probe);
    const Real *const scale = scales(tile.first_key), *const rate = rates(probe, tile.first_key), *k = scratch_.k;
    for (int64_t key = 0; key < tile.keys; ++key, to += problem_.head_dim, k += problem_.head_dim) {
      for (int64_t i = 0; i < problem_.head_dim; ++i) {
        to[i] = scale[key] * static_cast<Real>(from[i]) + rate[key] * k[i];
      }
      from += offsets.row_stride;
    }
  }

  SPARSECOD_INLINE void copy_keys(Real* to, int64_t pitch, const Rows<T>& tensor, const Tile& tile,
                                  int64_t probe = 0) const {
    const T* from = tensor.row(batch_, kv_head_, tile.first_key, probe);
    for (int64_t key = 0; key < tile.keys; ++key, to += pitch, from += tensor.row_stride) {
      for (int64_t i = 0; i < problem_.head_dim; ++i) to[i] = static_cast<Real>(from[i]);
    }
  }

  // Scores that follow from queries' and keys' numbers in scratch.
  SPARSECOD_INLINE Factors<Real> score_of(const Tile& tile, const Real* q, const Real* k) const {
    return {k, problem_.head_dim, 1, q + tile.begin, QUERIES};
  }

  // Outputs that follow from weights' and values' numbers in scratch.
  SPARSECOD_INLINE Factors<Real> output_of(const Tile& tile, const Real* weights, const Real* v) const {
    return {weights + tile.begin, 1, QUERIES, v, scratch_.pitch};
  }

  // Sums products of queries and keys to scores, not yet scaled.
  template <size_t COUNT>
  SPARSECOD_INLINE void score(Real* scores, const Factors<Real> (&factors)[COUNT], const Tile& tile) const {
    Product::add(scores + tile.begin, QUERIES, factors, tile.keys, QUERIES - tile.begin, problem_.head_dim, true);
  }

  // Overwrites scores of keys that a query does not see.
  SPARSECOD_INLINE void hide(Real* scores, const Tile& tile, Real hidden) const {
    for (int64_t key = 0; key < tile.keys; ++key, scores += QUERIES) {
      std::fill_n(scores + tile.begin, problem_.blind(tile.first_key + key, first_query_) - tile.begin, hidden);
    }
  }

  // Scores, then weights; and the factor by which those of earlier tiles shrink.
  SPARSECOD_INLINE void weigh(const Tile& tile) {
    copy_keys(scratch_.k, problem_.head_dim, problem_.k, tile);
    copy_keys(scratch_.v, scratch_.pitch, problem_.v, tile);
    score(scratch_.score, {score_of(tile, scratch_.q, scratch_.k)}, tile);
    for (int64_t at = 0; at < tile.keys * QUERIES; at += QUERIES) {
      for (Real* score = scratch_.score + at + tile.begin; score < scratch_.score + at + QUERIES; score += N) {
        Product::store(score, problem_.scale * Product::load(score));
      }
    }
    hide(scratch_.score, tile, -std::numeric_limits<Real>::infinity());
    for (int64_t query = tile.begin; query < QUERIES; query += N) {
      SoftmaxRow<V>& row = softmax_[query / N];
      Real* const score = scratch_.score + query;
      V largest = Product::load(score), sum{};
      for (int64_t key = 1; key < tile.keys; ++key) largest = larger(Product::load(score + key * QUERIES), largest);
      const V factor = row.raise(largest);
      for (int64_t at = 0; at < tile.keys * QUERIES; at += QUERIES) {
        const V weight = row.weigh(Product::load(score + at));
        Product::store(score + at, weight);
        sum += weight;
      }
      row.add(factor, sum);
      Product::store(scratch_.factor + query, factor);
    }
  }

  SPARSECOD_INLINE void add_scales(const Tile& tile) {
    const Real* const scale = scales(tile.first_key);
    for (int64_t query = tile.begin; query < QUERIES; query += N) {
      V sum = Product::load(scratch_.factor + query) * Product::load(scratch_.scale_sum + query);
      for (int64_t key = 0; key < tile.keys; ++key) {
        sum += scale[key] * Product::load(scratch_.score + key * QUERIES + query);
      }
      Product::store(scratch_.scale_sum + query, sum);
    }
  }

  // The same of one probe's tangents; and by how much what was accumulated shifts. What a shared probe's v' has of v
  // joins s', for p (s' - c) v + p rate v = p (s' - c + rate) v.
  SPARSECOD_INLINE void weigh_tangent(const Tile& tile, int64_t probe) {
    if (is_shared(probe)) {
      make_shared_keys(scratch_.k_tangent, tile, probe);
    } else {
      copy_keys(scratch_.k_tangent, problem_.head_dim, problem_.k_tangent, tile, probe - problem_.shared.probes);
    }
    const Real* const q_tangent = scratch_.q_tangent + probe * scratch_.q_size;
    score(scratch_.score_tangent,
          {score_of(tile, q_tangent, scratch_.k), score_of(tile, scratch_.q, scratch_.k_tangent)}, tile);
    hide(scratch_.score_tangent, tile, Real{0});
    for (int64_t query = tile.begin; query < QUERIES; query += N) {
      Real *const tangent_sum = scratch_.tangent_sum + probe * QUERIES + query,
                  *const tangent_mean = scratch_.tangent_mean + probe * QUERIES + query;
      SoftmaxTangent<V> tangent = {Product::load(tangent_sum), Product::load(tangent_mean)};
      const Real* const weight = scratch_.score + query;
      Real* const score_tangent = scratch_.score_tangent + query;
      V sum{};
      for (int64_t at = 0; at < tile.keys * QUERIES; at += QUERIES) {
        sum += Product::load(weight + at) * Product::load(score_tangent + at);
      }
      const V factor = Product::load(scratch_.factor + query);
      const V shift = tangent.add(softmax_[query / N], factor, problem_.scale * sum).shift;
      const Real* const rate = is_shared(probe) ? rates(probe, tile.first_key) : nullptr;
      for (int64_t key = 0, at = 0; key < tile.keys; ++key, at += QUERIES) {
        const V change = problem_.scale * Product::load(score_tangent + at) + (rate ? rate[key] : Real{0});
        Product::store(score_tangent + at, tangent.weigh(Product::load(weight + at), change));
      }
      Product::store(scratch_.shift + query, shift);
      Product::store(tangent_sum, tangent.sum);
      Product::store(tangent_mean, tangent.mean);
    }
  }

  SPARSECOD_INLINE void add_tangent(const Tile& tile, int64_t probe) {
    const int64_t pitch = scratch_.pitch;
    Real* const output_tangent = scratch_.output_tangent + probe * scratch_.output_size;
    for (int64_t query = tile.begin; query < queries_; ++query) {
      const typename SoftmaxTangent<V>::Change change = {V{} + scratch_.factor[query], V{} + scratch_.shift[query]};
      for (int64_t at = query * pitch; at < (query + 1) * pitch; at += N) {
        const Dual<V> sums = {Product::load(scratch_.output + at), Product::load(output_tangent + at)};
        Product::store(output_tangent + at, change(sums).tangent);
      }
    }
    const Factors<Real> of_weight_tangents = output_of(tile, scratch_.score_tangent, scratch_.v);
    if (is_shared(probe)) {  // the offset of v' is the same for all keys: it is added at the end
      add_output(output_tangent, {of_weight_tangents}, tile);
    } else {
      copy_keys(scratch_.v_tangent, pitch, problem_.v_tangent, tile, probe - problem_.shared.probes);
      add_output(output_tangent, {of_weight_tangents, output_of(tile, scratch_.score, scratch_.v_tangent)}, tile);
    }
  }

  template <size_t COUNT>
  SPARSECOD_INLINE void add_output(Real* output, const Factors<Real> (&factors)[COUNT], const Tile& tile) const {
    const int64_t pitch = scratch_.pitch;
    Product::add(output + tile.begin * pitch, pitch, factors, queries_ - tile.begin, pitch, tile.keys, false);
  }

  SPARSECOD_INLINE void add(const Tile& tile) {
    const int64_t pitch = scratch_.pitch;
    for (int64_t query = tile.begin; query < queries_; ++query) {
      const V factor = V{} + scratch_.factor[query];
      for (int64_t at = query * pitch; at < (query + 1) * pitch; at += N) {
        Product::store(scratch_.output + at, factor * Product::load(scratch_.output + at));
      }
    }
    add_output(scratch_.output, {output_of(tile, scratch_.score, scratch_.v)}, tile);
  }

  SPARSECOD_INLINE void write() const {
    const int64_t first_row = (batch_ * problem_.heads + head_) * problem_.queries + first_query_;
    for (int64_t query = 0; query < queries_; ++query) {
      Real max[N], sum[N];
      Product::store(max, softmax_[query / N].max);
      Product::store(sum, softmax_[query / N].sum);
      const SoftmaxRow<Real> row = {max[query % N], sum[query % N]};
      write(problem_.output, 0, query, row, scratch_.output);
      for (int64_t probe = 0; probe < problem_.probes; ++probe) {
        Real* const sums = scratch_.output_tangent + probe * scratch_.output_size;
        if (is_shared(probe)) {
          const T* const offset = problem_.shared.v_offset.row(0, kv_head_, 0, probe);
          for (int64_t i = 0; i < problem_.head_dim; ++i) {
            sums[query * scratch_.pitch + i] += scratch_.scale_sum[query] * static_cast<Real>(offset[i]);
          }
        }
        write(problem_.output_tangent, probe, query, row, sums);
      }
      problem_.log_sum_exp[first_row + query] = row.log_sum_exp();
    }
  }

  SPARSECOD_INLINE void write(const Rows<T>& tensor, int64_t probe, int64_t query, const SoftmaxRow<Real>& row,
                              const Real* sums) const {
    T* const to = tensor.row(batch_, head_, first_query_ + query, probe);
    for (int64_t i = 0; i < problem_.head_dim; ++i) {
      to[i] = static_cast<T>(row.output(sums[query * scratch_.pitch + i]));
    }
  }
};

template <typename T>
struct AttendBlock {
  template <int LANES>
  static SPARSECOD_INLINE void run(const Problem<T>& problem, Scratch<typename Problem<T>::Real>& scratch,
                                   int64_t batch, int64_t head, int64_t first_query) {
    Block<T, std::is_same_v<T, double> ? 1 : LANES>(problem, scratch, batch, head, first_query).run();
  }
};

}  // namespace

void flash_attention_jvp(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& q_tangent,
                         const at::Tensor& k_tangent, const at::Tensor& v_tangent,
                         const std::optional<SharedTangents>& shared, double scale, bool causal,
                         const at::Tensor& output, const at::Tensor& output_tangent, const at::Tensor& log_sum_exp) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "flash_attention_jvp", [&] {
    using Real = typename Problem<scalar_t>::Real;
    using Tensor = Rows<scalar_t>;
    static const auto attend = best_instruction_set<AttendBlock<scalar_t>, const Problem<scalar_t>&, Scratch<Real>&,
                                                    int64_t, int64_t, int64_t>();
    const Problem<scalar_t> problem = {Tensor(q),
                                       Tensor(k),
                                       Tensor(v),
                                       Tensor(q_tangent),
                                       Tensor(k_tangent),
                                       Tensor(v_tangent),
                                       Tensor(output),
                                       Tensor(output_tangent),
                                       SharedRows<scalar_t, Real>(shared, q),
                                       log_sum_exp.mutable_data_ptr<Real>(),
                                       output_tangent.size(0),
                                       q.size(0),
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
        attend(problem, scratch, head / problem.heads, head % problem.heads, i % blocks * QUERIES);
      }
    });
  });
}

}  // namespace sparsecod::cpu
