// The scheduler of the emulation.
#include "emulation.h"

#include <csetjmp>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace emulation {

Index thread, block;

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 << 10;
constexpr cudaError_t kBadLaunch = 9;    // cudaErrorInvalidConfiguration
constexpr cudaError_t kNotReached = 719; // cudaErrorLaunchFailure

enum State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf at;
  bool started;
  State state;
  int parity;
};

std::vector<Fiber> g_fibers;
std::vector<uint64_t>
    g_slots[2]; // by parity: one lane may give before another has taken
const std::function<void()> *g_body;
ucontext_t g_scheduler_start;
jmp_buf g_scheduler;
Fiber *g_running;
cudaError_t g_error;

[[noreturn]] void leave(State state) {
  g_running->state = state;
  _longjmp(g_scheduler, 1);
}

void wait(State state) {
  Fiber *self = g_running;
  self->state = state;
  if (!_setjmp(self->at))
    _longjmp(g_scheduler, 1);
}

void entry() {
  (*g_body)();
  leave(kDone);
}

// Until it waits or ends. Contexts make the first switch to a stack; later ones
// are jumps, which cost no system call.
void run(int id) {
  g_running = &g_fibers[id];
  thread.x = static_cast<unsigned>(id);
  if (_setjmp(g_scheduler))
    return;
  if (g_running->started)
    _longjmp(g_running->at, 1);
  g_running->started = true;
  swapcontext(&g_scheduler_start, &g_running->start);
}

// Until all lanes are at a barrier or done. False: some lanes are at a shuffle
// that others do not reach.
bool run_warp(int first) {
  for (;;) {
    int shuffling = 0;
    for (int id = first; id < first + kWarp && !g_error; ++id) {
      if (g_fibers[id].state == kReady)
        run(id);
      shuffling += g_fibers[id].state == kAtShuffle;
    }
    if (shuffling < kWarp)
      return shuffling == 0;
    for (int id = first; id < first + kWarp; ++id)
      g_fibers[id].state = kReady;
  }
}

bool run_block(int threads) {
  for (;;) {
    int waiting = 0;
    for (int first = 0; first < threads && !g_error; first += kWarp)
      if (!run_warp(first))
        return false;
    for (int id = 0; id < threads; ++id)
      waiting += g_fibers[id].state == kAtBarrier;
    if (waiting == 0 || g_error)
      return true;
    if (waiting < threads)
      return false;
    for (int id = 0; id < threads; ++id)
      g_fibers[id].state = kReady;
  }
}

} // namespace

void sync_block() { wait(kAtBarrier); }

uint64_t exchange(uint64_t mine, int from) {
  const auto id = static_cast<int>(thread.x);
  auto &slots = g_slots[g_fibers[id].parity ^= 1];
  slots[id] = mine;
  wait(kAtShuffle);
  return slots[id / kWarp * kWarp + from];
}

void stop(cudaError_t code) {
  g_error = code;
  leave(kDone);
}

cudaError_t launch(int64_t blocks, int threads,
                   const std::function<void()> &body) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024 ||
      threads % kWarp)
    return kBadLaunch;
  if (static_cast<int>(g_fibers.size()) < threads)
    g_fibers.resize(threads);
  for (auto &slots : g_slots)
    slots.resize(g_fibers.size());
  g_body = &body;
  g_error = cudaSuccess;
  for (int64_t b = 0; b < blocks && !g_error; ++b) {
    block.x = static_cast<unsigned>(b);
    for (int id = 0; id < threads; ++id) {
      Fiber &fiber = g_fibers[id];
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, entry, 0);
      fiber.started = false;
      fiber.state = kReady;
      fiber.parity = 0;
    }
    if (!run_block(threads))
      g_error = kNotReached;
  }
  return g_error;
}

} // namespace emulation
