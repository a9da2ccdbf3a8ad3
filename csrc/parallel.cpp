// Where threads come from.
#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace {

#if defined(__unix__) || defined(__APPLE__)

// Those of the OpenMP that torch has loaded, if any: its threads wait for work actively for a while, so
// that others would share their cores with them.
class Pool {
public:
  bool run(int threads, void (*work)(void *, int), void *data) const {
    // Threads do not survive a fork.
    if (!parallel_ || !number_ || getpid() != process_)
      return false;
    struct Call {
      void (*work)(void *, int);
      void *data;
      Number number;
    } call{work, data, number_};
    parallel_(
        [](void *data) {
          const Call &call = *static_cast<const Call *>(data);
          call.work(call.data, call.number());
        },
        &call, static_cast<unsigned>(threads), 0);
    return true;
  }

private:
  using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
  using Number = int (*)();
  const Parallel parallel_ = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  const Number number_ = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  const pid_t process_ = getpid();
};

#else

struct Pool {
  bool run(int, void (*)(void *, int), void *) const { return false; }
};

#endif

// Made when the library is loaded: the first call may come after a fork.
const Pool kPool;

} // namespace

void commkit::run_on_threads(int threads, void (*work)(void *, int), void *data) {
  if (kPool.run(threads, work, data))
    return;
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i)
      others.emplace_back(work, data, i);
  } catch (const std::system_error &) {
    // The rest is done by those that there are.
  }
  work(data, 0);
  for (auto &other : others)
    other.join();
}
