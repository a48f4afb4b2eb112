// The C functions that engram_kernel/__init__.py calls. Sizes and ids are checked there.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "hash.h"
#include "rows.h"

#define ENGRAM_API extern "C" __attribute__((visibility("default")))

namespace {

using engram::Hasher;
using engram::Plan;

constexpr int64_t kChunk = 128;  // tokens; their ids stay in the first-level cache

template <typename F>
void in_parts(int64_t count, int64_t threads, F f) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back(f, count * i / threads, count * (i + 1) / threads);
  }
  f(0, count / threads);
  for (std::thread& other : others) other.join();
}

}  // namespace

ENGRAM_API int64_t engram_abi_version() { return 1; }

ENGRAM_API const char* engram_instruction_set() {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return "avx512";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

// window [batch, max_n - 1 + tokens] to out [batch, tokens, C] of int64, or int32 if `narrow`.
ENGRAM_API void engram_hash(const Plan* plan, const int64_t* window, int64_t batch, int64_t tokens,
                            int64_t narrow, void* out) {
  const Hasher hasher(*plan);
  const int64_t width = plan->max_n - 1 + tokens;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t done = b * tokens * hasher.columns();
    if (narrow != 0) {
      hasher.run(window + b * width, tokens, static_cast<int32_t*>(out) + done);
    } else {
      hasher.run(window + b * width, tokens, static_cast<int64_t*>(out) + done);
    }
  }
}

ENGRAM_API void engram_gather(const uint8_t* table, int64_t row_bytes, const int64_t* ids,
                              int64_t count, int64_t threads, uint8_t* out) {
  in_parts(count, threads, [=](int64_t begin, int64_t end) {
    engram::gather(table, row_bytes, ids + begin, end - begin, out + begin * row_bytes);
  });
}

// Hash, and gather what was hashed, chunk by chunk: out [batch, tokens, C, row_bytes].
ENGRAM_API void engram_hash_gather(const Plan* plan, const int64_t* window, int64_t batch,
                                   int64_t tokens, const uint8_t* table, int64_t row_bytes,
                                   int64_t threads, uint8_t* out) {
  const Hasher hasher(*plan);
  const int64_t width = plan->max_n - 1 + tokens;
  const int64_t columns = hasher.columns();
  for (int64_t b = 0; b < batch; ++b) {
    uint8_t* rows = out + b * tokens * columns * row_bytes;
    in_parts(tokens, threads, [=, &hasher](int64_t begin, int64_t end) {
      std::vector<int64_t> ids(kChunk * columns);
      for (int64_t t = begin; t < end; t += kChunk) {
        const int64_t count = std::min(kChunk, end - t);
        hasher.run(window + b * width + t, count, ids.data());
        engram::gather(table, row_bytes, ids.data(), count * columns,
                       rows + t * columns * row_bytes);
      }
    });
  }
}

// 0, or an errno.
ENGRAM_API int64_t engram_read_rows(const int32_t* files, const int64_t* offsets, int64_t count,
                                    int64_t row_bytes, int64_t threads, uint8_t* out) {
  std::atomic<int> failed{0};
  in_parts(count, threads, [&, files, offsets, row_bytes, out](int64_t begin, int64_t end) {
    const int error = engram::read_rows(files + begin, offsets + begin, end - begin, row_bytes,
                                        out + begin * row_bytes);
    if (error != 0) failed = error;
  });
  return failed;
}
