// Remainders by multiplication with a reciprocal (Barrett 1986), exact, with the sign of numpy's
// and Python's %: between 0 and modulus - 1 for negative numbers too.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
// One version for each level, chosen when the library is loaded.
#define ENGRAM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ENGRAM_CLONES
#endif
#define ENGRAM_ALWAYS_INLINE inline __attribute__((always_inline))

namespace engram {

// Whether `remainder_double` is exact for a modulus. The quotient is at most 2^63 / 2^12 = 2^51;
// three roundings of 2^-53 each leave it wrong by less than 1, which one correction mends.
inline bool suits_double(int64_t modulus) {
  return modulus >= (int64_t{1} << 12) && modulus < (int64_t{1} << 51);
}

// `wide` is x as a double, `reciprocal` 1 / modulus. Free of branches, so that it vectorises.
ENGRAM_ALWAYS_INLINE int64_t remainder_double(int64_t x, double wide, int64_t modulus,
                                              double reciprocal) {
  const int64_t quotient = static_cast<int64_t>(std::floor(wide * reciprocal));
  const uint64_t product = static_cast<uint64_t>(quotient) * static_cast<uint64_t>(modulus);
  int64_t rest = static_cast<int64_t>(static_cast<uint64_t>(x) - product);
  rest += rest < 0 ? modulus : 0;
  rest -= rest >= modulus ? modulus : 0;
  return rest;
}

// For every modulus from 2 to 2^63 - 1, in integers.
inline int64_t remainder_integer(int64_t x, int64_t modulus) {
  using Wide = unsigned __int128;
  const uint64_t m = static_cast<uint64_t>(modulus);
  const uint64_t reciprocal = static_cast<uint64_t>((Wide{1} << 64) / m);
  // -x - 1 = q m + r gives x = -(q + 1) m + (m - 1 - r).
  const uint64_t positive = static_cast<uint64_t>(x < 0 ? ~x : x);
  const uint64_t quotient = static_cast<uint64_t>((Wide{positive} * reciprocal) >> 64);
  uint64_t rest = positive - quotient * m;
  if (rest >= m) rest -= m;
  return static_cast<int64_t>(x < 0 ? m - 1 - rest : rest);
}

}  // namespace engram
