#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "kernels.h"

namespace {

const commkit::Table *best() {
  if (const commkit::Table *avx512 = commkit::avx512_table())
    return avx512;
  const commkit::Table *avx2 = commkit::avx2_table();
  return avx2 ? avx2 : &commkit::baseline_table();
}

std::atomic<const commkit::Table *> g_table{nullptr};

} // namespace

const commkit::Table &commkit::table() {
  const Table *chosen = g_table.load(std::memory_order_acquire);
  if (!chosen)
    g_table.store(chosen = best(), std::memory_order_release);
  return *chosen;
}

int ck_interface() { return kInterface; }

int ck_select_level(const char *name) {
  const commkit::Table *wanted = nullptr;
  if (!*name)
    wanted = best();
  else if (!std::strcmp(name, "baseline"))
    wanted = &commkit::baseline_table();
  else if (!std::strcmp(name, "avx2"))
    wanted = commkit::avx2_table();
  else if (!std::strcmp(name, "avx512"))
    wanted = commkit::avx512_table();
  if (!wanted)
    return -1;
  g_table.store(wanted, std::memory_order_release);
  return 0;
}

const char *ck_level() { return commkit::table().name; }
