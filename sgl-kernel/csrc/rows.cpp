#include "rows.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unistd.h>

#include "remainder.h"

namespace engram {

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 32;  // rows; memory latency over the time one row takes, with room
constexpr int64_t kPage = 4096;
constexpr int64_t kReadMost = 256 << 10;

ENGRAM_ALWAYS_INLINE void copy_line(const uint8_t* from, uint8_t* to) {
  Words line;
  static_assert(sizeof line == kLine);
  std::memcpy(&line, from, kLine);
  std::memcpy(to, &line, kLine);
}

ENGRAM_ALWAYS_INLINE void copy_row(const uint8_t* from, int64_t bytes, uint8_t* to) {
  if (bytes < kLine) {
    std::memcpy(to, from, bytes);
    return;
  }
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) copy_line(from + i, to + i);
  // The last line overlaps the one before instead of ending in single bytes.
  copy_line(from + bytes - kLine, to + bytes - kLine);
}

inline int64_t page_down(int64_t offset) { return offset & ~(kPage - 1); }
inline int64_t page_up(int64_t offset) { return page_down(offset + kPage - 1); }

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};

// Read [low, high) of a file; what lies beyond its end is left as it is. 0, or an errno.
int read_all(int file, uint8_t* buffer, int64_t low, int64_t high, int64_t needed) {
  while (low < needed) {
    const ssize_t got = pread(file, buffer, high - low, low);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return ENODATA;
    buffer += got;
    low += got;
  }
  return 0;
}

}  // namespace

// A line goes through one register where there are such: the fewer instructions a row takes, the
// more of the rows ahead are under way at a time.
ENGRAM_CLONES void gather(const uint8_t* table, int64_t row_bytes, const int64_t* ids, int64_t count,
                          uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      const uint8_t* next = table + ids[i + kAhead] * row_bytes;
      // Into the second level: the first has too few slots for lines under way.
      for (int64_t j = 0; j < row_bytes; j += kLine) __builtin_prefetch(next + j, 0, 2);
      __builtin_prefetch(next + row_bytes - 1, 0, 2);
    }
    copy_row(table + ids[i] * row_bytes, row_bytes, out + i * row_bytes);
  }
}

int read_rows(const int32_t* files, const int64_t* offsets, int64_t count, int64_t row_bytes,
              uint8_t* out) {
  const int64_t most = page_up(row_bytes) + kPage > kReadMost ? page_up(row_bytes) + kPage : kReadMost;
  std::unique_ptr<uint8_t, Free> buffer(
      static_cast<uint8_t*>(std::aligned_alloc(kPage, page_up(most))));
  if (!buffer) return ENOMEM;
  for (int64_t i = 0; i < count;) {
    const int64_t low = page_down(offsets[i]);
    int64_t needed = offsets[i] + row_bytes;
    int64_t high = page_up(needed);
    int64_t next = i + 1;
    while (next < count && files[next] == files[i] && offsets[next] >= low &&
           page_down(offsets[next]) <= high && page_up(offsets[next] + row_bytes) - low <= most) {
      const int64_t end = offsets[next] + row_bytes;
      needed = end > needed ? end : needed;
      high = page_up(needed);
      ++next;
    }
    const int failed = read_all(files[i], buffer.get(), low, high, needed);
    if (failed != 0) return failed;
    for (; i < next; ++i) {
      copy_row(buffer.get() + (offsets[i] - low), row_bytes, out + i * row_bytes);
    }
  }
  return 0;
}

}  // namespace engram
