// N-gram hashes of a window of token ids, with exact remainders.
#pragma once

#include <cstdint>
#include <vector>

#include "remainder.h"

namespace engram {

// One layer's hash. Arrays belong to the caller. C = orders * heads columns, order first.
struct Plan {
  int64_t polynomial;          // 0: XOR of products, 1: sum of powers
  int64_t min_n, max_n, heads;
  int64_t pad;                 // id in front of a text
  int64_t blocks;              // 1: an id of kBlock ends every n-gram
  const int64_t* multipliers;  // [max_n], or [heads, max_n] if polynomial
  const int64_t* moduli;       // [C]
  const int64_t* sizes;        // [C]
  const int64_t* offsets;      // [C], added to the rows
};

constexpr int64_t kBlock = INT64_MIN;

// Up to eight heads of one order. Plain arrays: not every allocator aligns for wide vectors.
struct Lanes {
  int64_t moduli[kLanes];
  double reciprocals[kLanes];
  int64_t offsets[kLanes];
  int64_t count;
};

// A plan with its reciprocals; hashes runs of tokens.
class Hasher {
 public:
  explicit Hasher(const Plan& plan);

  int64_t columns() const { return columns_; }

  // Hash `count` tokens, the first of which is window[max_n - 1], to out [count, C].
  template <typename Out>
  void run(const int64_t* window, int64_t count, Out* out) const;

 private:
  int64_t mix(const int64_t* newest, int64_t order, int64_t column) const;

  Plan plan_;
  int64_t columns_;
  bool fast_;                 // every modulus suits the reciprocal in double
  std::vector<Lanes> lanes_;  // if fast: order by order
};

}  // namespace engram
