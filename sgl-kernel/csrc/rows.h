// Rows copied from memory, and read from files.
#pragma once

#include <cstdint>

namespace engram {

// Copy rows `ids` of `table` to `out`, in order. Ids are not checked.
void gather(const uint8_t* table, int64_t row_bytes, const int64_t* ids, int64_t count,
            uint8_t* out);

// Read rows at `offsets` of `files` (descriptors opened with O_DIRECT or not) to `out`. Reads are
// aligned to 4 KiB, and one read serves neighbours in the list that share pages or touch.
// 0, or an errno.
int read_rows(const int32_t* files, const int64_t* offsets, int64_t count, int64_t row_bytes,
              uint8_t* out);

}  // namespace engram
