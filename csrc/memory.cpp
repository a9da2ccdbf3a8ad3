#include <cstdint>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

void ck_prefer_huge_pages(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole huge pages inside the range, so that nothing beside it is touched; the kernel is free to
  // refuse.
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto at = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (at + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (at + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (first < last)
    madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}
