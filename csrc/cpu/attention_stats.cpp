// Entropy of attention weights, and how many are below thresholds, per head, from queries, keys and log-sum-exp.
//
// A thread takes a block of queries, transposed so that lanes are queries, past all keys they see, a few keys at a
// time: the products stay in registers until they are exponents, and nothing of the size T x S is ever stored.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/thresholds.h"
#include "exponential.h"
#include "instruction_set.h"
#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int64_t QUERIES_PER_BLOCK = 128;
constexpr int64_t KEYS_PER_TILE = 96;

template <typename Real>
using IndexOf = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;  // in lanes as wide as Real's

struct Sums {
  double entropy = 0;
  std::array<int64_t, MAX_THRESHOLDS> counts{};
};

// A block of queries in panels [panels, head_dim, panel width], and a tile of keys [num_keys, head_dim].
template <typename Real>
struct Tile {
  const Real* queries;
  const Real* lse;
  const IndexOf<Real>* visible;  // how many of the keys each query sees: the first ones
  const Real* keys;
  int64_t key_stride, num_keys, head_dim, panels;
  Real scale;
  const Real* log_thresholds;
  int num_thresholds;
};

template <typename Real, int REGISTER_BYTES>
struct Kernel {
  static constexpr int N = REGISTER_BYTES / sizeof(Real);
  static constexpr int PACKS = 2;
  static constexpr int WIDTH = PACKS * N;  // queries of a panel
  static constexpr int KEYS = REGISTER_BYTES == 64 ? 12 : 6;  // times PACKS: most registers are accumulators
  static_assert(KEYS_PER_TILE % KEYS == 0 && QUERIES_PER_BLOCK % WIDTH == 0);
  using V = Lanes<Real, N>;
  using Index = Lanes<IndexOf<Real>, N>;

  static SPARSECOD_INLINE V load(const Real* from) {
    V pack;
    std::memcpy(&pack, from, sizeof(pack));
    return pack;
  }

  // products[i][p] = keys[i] . queries[p]
  static SPARSECOD_INLINE void multiply(V (&products)[KEYS][PACKS], const Real* const (&keys)[KEYS],
                                        const Real* queries, int64_t head_dim) {
    for (int i = 0; i < KEYS; ++i) {
      for (int p = 0; p < PACKS; ++p) products[i][p] = V{};
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      const V query[PACKS] = {load(queries + d * WIDTH), load(queries + d * WIDTH + N)};
      for (int i = 0; i < KEYS; ++i) {
        const Real key = keys[i][d];
        for (int p = 0; p < PACKS; ++p) products[i][p] += query[p] * key;
      }
    }
  }

  template <bool MASKED>
  static SPARSECOD_INLINE void add_keys(V& entropy, Index (&counts)[MAX_THRESHOLDS], const Tile<Real>& tile,
                                        int64_t panel, int64_t first_key) {
    const Real* keys[KEYS];
    for (int i = 0; i < KEYS; ++i) {  // those past the end are not visible, but must be there
      keys[i] = tile.keys + std::min(first_key + i, tile.num_keys - 1) * tile.key_stride;
    }
    V logs[KEYS][PACKS];  // of the weights
    multiply(logs, keys, tile.queries + panel * WIDTH * tile.head_dim, tile.head_dim);
    for (int p = 0; p < PACKS; ++p) {
      const V lse = load(tile.lse + panel * WIDTH + p * N);
      Index visible;
      std::memcpy(&visible, tile.visible + panel * WIDTH + p * N, sizeof(visible));
      for (int i = 0; i < KEYS; ++i) {
        V log = logs[i][p] * tile.scale - lse;
        if constexpr (MASKED) {
          const Index seen = (Index{} + static_cast<IndexOf<Real>>(first_key + i)) < visible;
          const V weightless = V{} - std::numeric_limits<Real>::max();
          const V below_nothing = V{} + std::numeric_limits<Real>::infinity();
          const V finite = seen ? log : weightless;
          entropy -= exponential<Real, N>(finite) * finite;
          log = seen ? log : below_nothing;
        } else {
          entropy -= exponential<Real, N>(log) * log;
        }
        logs[i][p] = log;
      }
    }
    for (int t = 0; t < tile.num_thresholds; ++t) {
      const V bound = V{} + tile.log_thresholds[t];
      Index count = counts[t];
      for (int i = 0; i < KEYS; ++i) {
        for (int p = 0; p < PACKS; ++p) count -= logs[i][p] < bound;  // true is -1
      }
      counts[t] = count;
    }
  }

  static SPARSECOD_INLINE void add_tile(Sums& sums, const Tile<Real>& tile) {
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      const IndexOf<Real>* visible = tile.visible + panel * WIDTH;
      IndexOf<Real> fewest = visible[0], most = visible[0];
      for (int i = 1; i < WIDTH; ++i) {
        fewest = std::min(fewest, visible[i]);
        most = std::max(most, visible[i]);
      }
      V entropy{};
      Index counts[MAX_THRESHOLDS]{};
      for (int64_t key = 0; key < most; key += KEYS) {
        if (key + KEYS <= fewest) {
          add_keys<false>(entropy, counts, tile, panel, key);
        } else {
          add_keys<true>(entropy, counts, tile, panel, key);
        }
      }
      Real entropies[N];
      std::memcpy(entropies, &entropy, sizeof(entropy));
      for (Real each : entropies) sums.entropy += each;
      for (int t = 0; t < tile.num_thresholds; ++t) sums.counts[t] += fold<IndexOf<Real>, N>(counts[t], Sum{});
    }
  }
};

template <typename Real>
struct AddTile {
  template <int N>
  static SPARSECOD_INLINE void run(Sums& sums, const Tile<Real>& tile) {
    Kernel<Real, sizeof(float) * N>::add_tile(sums, tile);
  }
};

template <typename Real>
struct PanelWidth {
  template <int N>
  static SPARSECOD_INLINE void run(int64_t& width) {
    width = Kernel<Real, sizeof(float) * N>::WIDTH;
  }
};

// For this processor.
template <typename Real>
struct Compiled {
  void (*add_tile)(Sums&, const Tile<Real>&) = best_instruction_set<AddTile<Real>, Sums&, const Tile<Real>&>();
  int64_t panel_width;

  Compiled() { best_instruction_set<PanelWidth<Real>, int64_t&>()(panel_width); }
};

// Rows of one head, some distance apart.
template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
};

template <typename T>
Rows<T> rows_of(const at::Tensor& x_BHTD, int64_t batch, int64_t head) {
  return {x_BHTD.const_data_ptr<T>() + batch * x_BHTD.stride(0) + head * x_BHTD.stride(1), x_BHTD.stride(2)};
}

// Sums over queries [begin, end) of one head; the last of `num_queries` queries sees all keys.
template <typename T, typename Real>
Sums add_block(Rows<T> queries, Rows<T> keys, const Real* lse, int64_t begin, int64_t end, int64_t num_queries,
               int64_t num_keys, Tile<Real> tile, const Compiled<Real>& compiled, bool causal) {
  const int64_t width = compiled.panel_width, head_dim = tile.head_dim;
  tile.panels = at::divup(end - begin, width);
  const int64_t padded = tile.panels * width;
  std::vector<Real> panels(padded * head_dim), padded_lse(padded), converted;
  std::vector<IndexOf<Real>> visible(padded);
  for (int64_t i = 0; i < end - begin; ++i) {
    const T* query = queries.first + (begin + i) * queries.stride;
    Real* column = panels.data() + i / width * width * head_dim + i % width;
    for (int64_t d = 0; d < head_dim; ++d) column[d * width] = static_cast<Real>(query[d]);
    padded_lse[i] = lse[begin + i];
  }
  tile.queries = panels.data();
  tile.lse = padded_lse.data();
  tile.visible = visible.data();
  if constexpr (!std::is_same_v<T, Real>) converted.resize(KEYS_PER_TILE * head_dim);

  Sums sums;
  const int64_t last_seen = causal ? num_keys - (num_queries - end) : num_keys;
  for (int64_t key = 0; key < last_seen; key += KEYS_PER_TILE) {
    tile.num_keys = std::min(KEYS_PER_TILE, last_seen - key);
    const T* first = keys.first + key * keys.stride;
    if constexpr (std::is_same_v<T, Real>) {
      tile.keys = first;
      tile.key_stride = keys.stride;
    } else {
      for (int64_t i = 0; i < tile.num_keys; ++i) {
        for (int64_t d = 0; d < head_dim; ++d) {
          converted[i * head_dim + d] = static_cast<Real>(first[i * keys.stride + d]);
        }
      }
      tile.keys = converted.data();
      tile.key_stride = head_dim;
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t seen = causal ? num_keys - num_queries + begin + i + 1 : num_keys;
      visible[i] = static_cast<IndexOf<Real>>(std::clamp(seen - key, int64_t{0}, tile.num_keys));
    }
    compiled.add_tile(sums, tile);
  }
  return sums;
}

template <typename T>
void add_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
               at::ArrayRef<double> thresholds, bool causal, const at::Tensor& entropy, const at::Tensor& counts) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static const Compiled<Real> compiled;
  const int64_t heads = q.size(1), group = heads / k.size(1), num_queries = q.size(2), num_keys = k.size(2);
  Real log_thresholds[MAX_THRESHOLDS];
  for (size_t i = 0; i < thresholds.size(); ++i) log_thresholds[i] = static_cast<Real>(std::log(thresholds[i]));
  Tile<Real> tile{};
  tile.head_dim = q.size(3);
  tile.scale = static_cast<Real>(scale);
  tile.log_thresholds = log_thresholds;
  tile.num_thresholds = static_cast<int>(thresholds.size());

  // Blocks are the same for any number of threads, and are added in order: so are the results.
  const int64_t blocks_per_head = at::divup(num_queries, QUERIES_PER_BLOCK);
  std::vector<Sums> blocks(q.size(0) * heads * blocks_per_head);
  at::parallel_for(0, blocks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block / blocks_per_head, batch = row / heads, head = row % heads;
      // The first with the last, the second with the last but one: causal pairs take the same time.
      const int64_t turn = block % blocks_per_head;
      const int64_t begin = (turn % 2 == 0 ? turn / 2 : blocks_per_head - 1 - turn / 2) * QUERIES_PER_BLOCK;
      const int64_t end = std::min(begin + QUERIES_PER_BLOCK, num_queries);
      blocks[block] = add_block(rows_of<T>(q, batch, head), rows_of<T>(k, batch, head / group),
                                lse.const_data_ptr<Real>() + row * num_queries, begin, end, num_queries, num_keys,
                                tile, compiled, causal);
    }
  });
  double* entropies = entropy.mutable_data_ptr<double>();
  int64_t* all_counts = counts.mutable_data_ptr<int64_t>();
  for (size_t block = 0; block < blocks.size(); ++block) {
    const int64_t row = static_cast<int64_t>(block) / blocks_per_head;
    entropies[row] += blocks[block].entropy;
    for (size_t i = 0; i < thresholds.size(); ++i) all_counts[row * thresholds.size() + i] += blocks[block].counts[i];
  }
}

}  // namespace

void attention_stats(const at::Tensor& q, const at::Tensor& k, const at::Tensor& lse, double scale,
                     at::ArrayRef<double> thresholds, bool causal, const at::Tensor& entropy,
                     const at::Tensor& counts) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "attention_stats", [&] {
    add_heads<scalar_t>(q, k, lse, scale, thresholds, causal, entropy, counts);
  });
}

}  // namespace sparsecod::cpu
