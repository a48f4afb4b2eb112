#include "hash.h"

#include <cstring>

namespace engram {

Hasher::Hasher(const Plan& plan)
    : plan_(plan),
      columns_((plan.max_n - plan.min_n + 1) * plan.heads),
      fast_(plan.polynomial == 0) {
  for (int64_t c = 0; c < columns_; ++c) fast_ = fast_ && suits_double(plan.moduli[c]);
  if (!fast_) return;
  for (int64_t first = 0; first < columns_; first += plan.heads) {
    for (int64_t h = 0; h < plan.heads; h += kLanes) {
      Lanes lanes;
      lanes.count = plan.heads - h < kLanes ? plan.heads - h : kLanes;
      for (int64_t i = 0; i < kLanes; ++i) {
        // Lanes beyond the last head compute something too; it is not stored.
        const int64_t column = first + h + (i < lanes.count ? i : 0);
        lanes.moduli[i] = plan.moduli[column];
        lanes.reciprocals[i] = 1.0 / static_cast<double>(plan.moduli[column]);
        lanes.offsets[i] = plan.offsets[column];
      }
      lanes_.push_back(lanes);
    }
  }
}

namespace {

// The part of a token's ids that can be hashed: from a block on, everything older is pad.
// Writes max_n ids, the newest first.
inline void look_back(const Plan& plan, const int64_t* newest, int64_t* ids) {
  bool blocked = false;
  for (int64_t k = 0; k < plan.max_n; ++k) {
    const int64_t id = newest[-k];
    blocked = blocked || (plan.blocks != 0 && id == kBlock);
    ids[k] = blocked ? plan.pad : id;
  }
}

// Products and sums wrap, as they do in numpy; signed overflow would be undefined here.
inline int64_t multiply(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

inline int64_t add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

template <typename Vector>
ENGRAM_ALWAYS_INLINE Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// The common case, apart so that the compiler makes a version for each instruction set.
template <typename Out>
ENGRAM_ALWAYS_INLINE void xor_tokens(const Plan& plan, const Lanes* order_lanes, int64_t per_order,
                                     const int64_t* window, int64_t count, Out* out) {
  typedef Out Narrow __attribute__((vector_size(kLanes * sizeof(Out))));
  const int64_t context = plan.max_n - 1;
  const bool blocks = plan.blocks != 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t* newest = window + context + t;
    const Lanes* lanes = order_lanes;
    int64_t mix = 0;
    bool blocked = false;
    for (int64_t k = 0; k <= context; ++k) {
      int64_t id = newest[-k];
      if (blocks) {
        blocked = blocked || id == kBlock;
        id = blocked ? plan.pad : id;
      }
      mix ^= multiply(id, plan.multipliers[k]);
      if (k + 1 < plan.min_n) continue;
      for (int64_t i = 0; i < per_order; ++i, ++lanes) {
        const Ints rest = remainder_double(mix, load<Ints>(lanes->moduli),
                                           load<Doubles>(lanes->reciprocals));
        const Narrow rows = __builtin_convertvector(rest + load<Ints>(lanes->offsets), Narrow);
        if (lanes->count == kLanes) {
          std::memcpy(out, &rows, sizeof(rows));
        } else {
          std::memcpy(out, &rows, lanes->count * sizeof(Out));
        }
        out += lanes->count;
      }
    }
  }
}

ENGRAM_CLONES void xor_fast(const Plan& plan, const Lanes* lanes, int64_t per_order,
                            const int64_t* window, int64_t count, int64_t* out) {
  xor_tokens(plan, lanes, per_order, window, count, out);
}

ENGRAM_CLONES void xor_fast(const Plan& plan, const Lanes* lanes, int64_t per_order,
                            const int64_t* window, int64_t count, int32_t* out) {
  xor_tokens(plan, lanes, per_order, window, count, out);
}

}  // namespace

// The hash of `order` before the remainder, for any plan; `ids` newest first.
int64_t Hasher::mix(const int64_t* ids, int64_t order, int64_t head) const {
  int64_t mix = 0;
  for (int64_t k = 0; k < order; ++k) {
    if (plan_.polynomial != 0) {
      mix = add(mix, multiply(ids[order - 1 - k], plan_.multipliers[head * plan_.max_n + k]));
    } else {
      mix ^= multiply(ids[k], plan_.multipliers[k]);
    }
  }
  return mix;
}

template <typename Out>
void Hasher::run(const int64_t* window, int64_t count, Out* out) const {
  if (fast_) {
    xor_fast(plan_, lanes_.data(), (plan_.heads + kLanes - 1) / kLanes, window, count, out);
    return;
  }
  std::vector<int64_t> ids(plan_.max_n);
  for (int64_t t = 0; t < count; ++t) {
    look_back(plan_, window + plan_.max_n - 1 + t, ids.data());
    for (int64_t c = 0; c < columns_; ++c) {
      const int64_t hash = mix(ids.data(), plan_.min_n + c / plan_.heads, c % plan_.heads);
      int64_t rest = remainder_integer(hash, plan_.moduli[c]);
      if (plan_.polynomial != 0) rest = remainder_integer(rest, plan_.sizes[c]);
      *out++ = static_cast<Out>(rest + plan_.offsets[c]);
    }
  }
}

template void Hasher::run<int64_t>(const int64_t*, int64_t, int64_t*) const;
template void Hasher::run<int32_t>(const int64_t*, int64_t, int32_t*) const;

}  // namespace engram
