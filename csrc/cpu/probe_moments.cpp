// Sums over tokens of u, ||u||^2 and v . u, for several probes, in one pass over u.
//
// Tokens are cut into chunks by the shape alone, and the chunks' sums are added in order: results do not depend on the
// thread count. Few numbers are added in float32 before their sum goes to float64: where tokens are nearly constant, the
// roundings of longer sums may all point one way.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../common/probe_moments.h"
#include "instruction_set.h"
#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int TOKENS_AT_ONCE = 8;  // as many streams as prefetchers follow with ease
constexpr int64_t MIN_TOKENS_PER_CHUNK = 128;  // so that adding up chunks costs little
constexpr int64_t MAX_CHUNKS = 256;  // over all probes; each holds D float64 sums
constexpr int64_t ELEMENTS_PER_THREAD = 32768;  // fewer are not worth waking one

// One chunk of one probe's tokens.
template <typename T>
struct Chunk {
  const T* u;
  const T* v;  // of these tokens; null where v is shared
  int64_t tokens, width;

  SPARSECOD_INLINE Chunk from(int64_t token) const {
    return {u + token * width, v ? v + token * width : nullptr, tokens - token, width};
  }
};

struct ChunkTotals {
  double squared_norm = 0, product = 0;
};

// PER_TOKEN: each token has its own v. A shared v is multiplied with the columns' sums instead, once for all tokens.
template <typename T, bool PER_TOKEN>
struct ProbeChunk {
  // Adds to `totals` and to `sums` [D], whose order is that in which packs take columns.
  template <int N>
  static SPARSECOD_INLINE void run(double* sums, ChunkTotals& totals, const Chunk<T>& chunk) {
    int64_t token = 0;
    for (; token + TOKENS_AT_ONCE <= chunk.tokens; token += TOKENS_AT_ONCE) {
      add_tokens<N, TOKENS_AT_ONCE>(sums, totals, chunk.from(token));
    }
    for (; token < chunk.tokens; ++token) add_tokens<N, 1>(sums, totals, chunk.from(token));
  }

  // The column whose sum `run<N>` leaves at `place`.
  template <int N>
  static SPARSECOD_INLINE int64_t column_at(int64_t place, int64_t width) {
    using Block = Columns<T, N>;
    const int64_t block = place / Block::COUNT * Block::COUNT, within = place - block;
    return block + Block::COUNT > width ? place : block + within % N * Block::PACKS + within / N;
  }

 private:
  template <int N, int TOKENS>
  static SPARSECOD_INLINE void add_tokens(double* sums, ChunkTotals& totals, const Chunk<T>& tokens) {
    const int64_t rest = add_columns<N, TOKENS>(sums, totals, tokens, 0);
    if (rest < tokens.width) add_columns<1, TOKENS>(sums, totals, tokens, rest);
  }

  template <int N, int TOKENS>
  static SPARSECOD_INLINE int64_t add_columns(double* sums, ChunkTotals& totals, const Chunk<T>& tokens,
                                              int64_t column) {
    using Block = Columns<T, N>;
    using Real = typename Block::Real;
    using V = Lanes<Real, N>;
    SumOf<Real, N> squared_norm, product;
    for (; column + Block::COUNT <= tokens.width; column += Block::COUNT) {
      V column_sums[Block::PACKS]{}, squares[2]{}, products[2]{};
      for (int t = 0; t < TOKENS; ++t) {
        Block u, v;
        u.load(tokens.u + t * tokens.width + column);
        if constexpr (PER_TOKEN) v.load(tokens.v + t * tokens.width + column);
        for (int i = 0; i < Block::PACKS; ++i) {
          column_sums[i] += u.packs[i];
          squares[t % 2] += u.packs[i] * u.packs[i];
          if constexpr (PER_TOKEN) products[t % 2] += u.packs[i] * v.packs[i];
        }
      }
      for (int i = 0; i < Block::PACKS; ++i) add_to<Real, N>(sums + column + i * N, column_sums[i]);
      for (int i = 0; i < 2; ++i) {
        squared_norm.add(squares[i]);
        if constexpr (PER_TOKEN) product.add(products[i]);
      }
    }
    totals.squared_norm += squared_norm.total();
    totals.product += product.total();
    return column;
  }

  template <typename Real, int N>
  static SPARSECOD_INLINE void add_to(double* sums, Lanes<Real, N> x) {
    constexpr int HALF = N == 1 ? 1 : N / 2;  // in float64 these fill as wide a register
    Lanes<Real, HALF> halves[N / HALF];
    std::memcpy(halves, &x, sizeof(x));
    for (int i = 0; i < N / HALF; ++i) {
      Lanes<double, HALF> sum;
      std::memcpy(&sum, sums + i * HALF, sizeof(sum));
      if constexpr (N == 1) {
        sum += halves[i];
      } else {
        sum += __builtin_convertvector(halves[i], Lanes<double, HALF>);
      }
      std::memcpy(sums + i * HALF, &sum, sizeof(sum));
    }
  }
};

// Puts sums in the order of columns.
template <typename T>
struct InColumnOrder {
  template <int N>
  static SPARSECOD_INLINE void run(double* ordered, const double* sums, int64_t width) {
    for (int64_t place = 0; place < width; ++place) {
      ordered[ProbeChunk<T, false>::template column_at<N>(place, width)] = sums[place];
    }
  }
};

template <typename T, bool PER_TOKEN>
void add_probes(const T* v, const T* u, double* sums, double* moments, int64_t probes, int64_t tokens, int64_t width) {
  static const auto add_chunk =
      best_instruction_set<ProbeChunk<T, PER_TOKEN>, double*, ChunkTotals&, const Chunk<T>&>();
  static const auto in_column_order = best_instruction_set<InColumnOrder<T>, double*, const double*, int64_t>();
  const int64_t max_chunks = std::max<int64_t>(1, MAX_CHUNKS / probes);
  const int64_t tokens_per_chunk = std::max(MIN_TOKENS_PER_CHUNK, at::divup(tokens, max_chunks));
  const int64_t chunks = at::divup(tokens, tokens_per_chunk);
  std::vector<double> chunk_sums(probes * chunks * width);
  std::vector<ChunkTotals> chunk_totals(probes * chunks);
  const int64_t elements_per_chunk = std::min(tokens, tokens_per_chunk) * width;
  at::parallel_for(0, probes * chunks, at::divup(ELEMENTS_PER_THREAD, elements_per_chunk),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t probe = i / chunks, token = i % chunks * tokens_per_chunk;
                       const int64_t at = (probe * tokens + token) * width;
                       add_chunk(chunk_sums.data() + i * width, chunk_totals[i],
                                 {u + at, PER_TOKEN ? v + at : nullptr, std::min(tokens_per_chunk, tokens - token),
                                  width});
                     }
                   });
  at::parallel_for(0, probes, at::divup(ELEMENTS_PER_THREAD, chunks * width), [&](int64_t begin, int64_t end) {
    std::vector<double> ordered(width);
    for (int64_t probe = begin; probe < end; ++probe) {
      double* of_probe = chunk_sums.data() + probe * chunks * width;
      ChunkTotals totals = chunk_totals[probe * chunks];
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        for (int64_t i = 0; i < width; ++i) of_probe[i] += of_probe[chunk * width + i];
        totals.squared_norm += chunk_totals[probe * chunks + chunk].squared_norm;
        totals.product += chunk_totals[probe * chunks + chunk].product;
      }
      in_column_order(ordered.data(), of_probe, width);
      for (int64_t column = 0; column < width; ++column) {
        sums[probe * width + column] += ordered[column];
        if constexpr (!PER_TOKEN) totals.product += static_cast<double>(v[probe * width + column]) * ordered[column];
      }
      moments[probe * ProbeMoment::COUNT + ProbeMoment::SQUARED_NORM] += totals.squared_norm;
      moments[probe * ProbeMoment::COUNT + ProbeMoment::PRODUCT] += totals.product;
      moments[probe * ProbeMoment::COUNT + ProbeMoment::TOKENS] += tokens;
    }
  });
}

}  // namespace

void probe_moments(const at::Tensor& v, const at::Tensor& u, const at::Tensor& sums, const at::Tensor& moments) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "probe_moments", [&] {
    const auto add = v.dim() == 3 ? &add_probes<scalar_t, true> : &add_probes<scalar_t, false>;
    add(v.const_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(), sums.mutable_data_ptr<double>(),
        moments.mutable_data_ptr<double>(), u.size(0), u.size(1), u.size(2));
  });
}

}  // namespace sparsecod::cpu
