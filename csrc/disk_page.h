// Pages of a record file: layout, checksum, and copies of records into and out of them. The layout
// is described in shardlab/pages.py, which has the same arithmetic for the planner.
#pragma once
#include <cstdint>

namespace shardlab {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kTrailerBytes = 8;
constexpr int64_t kPayloadBytes = kPageBytes - kTrailerBytes;
constexpr int64_t kHeaderPages = 1;

// How records lie in pages. A unit is the smallest span with whole records: a page of records, or
// the pages of one record.
struct PageLayout {
  int64_t record_bytes;
  int64_t records;  // in a unit
  int64_t pages;    // of a unit

  int64_t unit_of(int64_t row) const { return row / records; }
  int64_t first_page(int64_t unit) const { return kHeaderPages + unit * pages; }
};

PageLayout page_layout(int64_t record_bytes);

// 64-bit checksum of a page's payload, its number and its file's salt; never 0, so that a page that
// was never written cannot pass. Any change of one 8-byte word is found for certain, any other but
// for a chance of 2^-64.
uint64_t page_checksum(const char* page, int64_t number, uint64_t salt);

// Writes, or compares, the trailers of the pages of one unit.
void seal_unit(char* unit, int64_t first_page, int64_t pages, uint64_t salt);
// The first page whose trailer is wrong, or -1.
int64_t find_broken_page(const char* unit, int64_t first_page, int64_t pages, uint64_t salt);

// Copies record `slot` of a unit to, or from, `record`.
void copy_out(const PageLayout& layout, const char* unit, int64_t slot, char* record);
void copy_in(const PageLayout& layout, char* unit, int64_t slot, const char* record);

}  // namespace shardlab
