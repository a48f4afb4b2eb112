// Remainders by multiplication with a reciprocal (Barrett 1986), exact, with the sign of numpy's
// and Python's %: between 0 and modulus - 1 for negative numbers too.
#pragma once

#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
// One version for each level, chosen when the library is loaded.
#define ENGRAM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ENGRAM_CLONES
#endif
#define ENGRAM_ALWAYS_INLINE inline __attribute__((always_inline))

namespace engram {

// Eight numbers at a time; compilers split them where registers are narrower.
constexpr int64_t kLanes = 8;
typedef int64_t Ints __attribute__((vector_size(kLanes * sizeof(int64_t))));
typedef uint64_t Words __attribute__((vector_size(kLanes * sizeof(uint64_t))));
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));

// Whether `remainder_double` is exact for a modulus.
inline bool suits_double(int64_t modulus) {
  return modulus >= (int64_t{1} << 12) && modulus < (int64_t{1} << 51);
}

// x modulo each of eight moduli, given 1 / modulus.
//
// The quotient is at most 2^63 / 2^12 = 2^51, and three roundings of 2^-53 each leave it wrong by
// less than 0.76. Cut towards zero it lies between 1 below and 2 above the floor (2 for negative x
// alone), so the rest lies in [-2 m, 2 m).
ENGRAM_ALWAYS_INLINE Ints remainder_double(int64_t x, Ints modulus, Doubles reciprocal) {
  const double wide = static_cast<double>(x);
  const Ints quotient = __builtin_convertvector(wide * reciprocal, Ints);
  // Unsigned: beside the ends of 64 bits the product leaves them, and the difference comes back.
  Ints rest = (Ints)(static_cast<uint64_t>(x) - (Words)quotient * (Words)modulus);
  rest += (rest < 0) & modulus;
  rest += (rest < 0) & modulus;
  rest -= (rest >= modulus) & modulus;
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
