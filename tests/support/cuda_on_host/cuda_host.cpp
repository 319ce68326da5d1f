// See cuda_host.h.

#include "cuda_host.h"

#include <limits.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

kssm_host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace kssm_host {

unsigned char* shared_memory;
Traffic loaded, stored;

namespace {

constexpr size_t kStack = 1 << 17, kGuard = 256;
constexpr int kWarp = 32;

enum class State { kReady, kAtBlockBarrier, kAtWarp, kLeft };

struct Fiber {
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false;

  State state = State::kLeft;
  const char* file = "";  // where it waits
  int line = 0;
  unsigned mask = 0;  // of lanes that a shuffle names
  uint64_t value = 0;
  int source = 0;
};

enum Order { kAscending, kDescending, kShuffled };

std::vector<Fiber> fibers;
jmp_buf scheduler;
ucontext_t first_context;
Fiber* current;
const std::function<void()>* body;
std::string message;
int order = kAscending;
std::mutex one_launch_at_a_time;

// Leaves the running fiber, until it is resumed.
void yield() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*body)();
    current->state = State::kLeft;
    yield();
  }
}

// A fiber's first step needs a context, which saves the signal mask by a system call; all others are jumps.
void resume(Fiber& fiber, int thread) {
  current = &fiber;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = &first_context;
  makecontext(&context, live, 0);
  setcontext(&context);
}

std::string base_name(const char* file) {
  const std::string path = file;
  return path.substr(path.find_last_of('/') + 1);
}

std::string place_of(int thread) {
  const Fiber& f = fibers[static_cast<size_t>(thread)];
  std::string text = "thread " + std::to_string(thread);
  if (f.state == State::kLeft) return text + " has left the kernel";
  text += f.state == State::kAtBlockBarrier ? " waits at the block's barrier in " : " waits for its warp in ";
  return text + base_name(f.file) + ":" + std::to_string(f.line);
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.line == b.line && !strcmp(a.file, b.file);
}

// Lets go a warp's lanes, if all that one of them names are there.
bool release_lanes(int first_of_warp, int threads, int thread) {
  const Fiber& leader = fibers[static_cast<size_t>(thread)];
  for (int l = 0; l < kWarp; ++l) {
    if (!(leader.mask >> l & 1)) continue;
    if (first_of_warp + l >= threads) return false;
    const Fiber& f = fibers[static_cast<size_t>(first_of_warp + l)];
    if (!same_place(f, leader) || f.mask != leader.mask || !(f.mask >> f.source & 1)) return false;
  }
  uint64_t values[kWarp];
  for (int l = 0; l < kWarp; ++l)
    if (leader.mask >> l & 1) values[l] = fibers[static_cast<size_t>(first_of_warp + l)].value;
  const unsigned mask = leader.mask;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber& f = fibers[static_cast<size_t>(first_of_warp + l)];
    f.value = values[f.source];
    f.state = State::kReady;
  }
  return true;
}

bool release_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    const Fiber& f = fibers[static_cast<size_t>(t)];
    if (f.state != State::kAtBlockBarrier || !same_place(f, fibers[0])) return false;
  }
  for (int t = 0; t < threads; ++t) fibers[static_cast<size_t>(t)].state = State::kReady;
  return true;
}

// All threads wait or have left, and none can be let go: whom they wait for.
void report_divergence(int threads) {
  int waiting = 0;
  while (fibers[static_cast<size_t>(waiting)].state == State::kLeft) ++waiting;
  const Fiber& leader = fibers[static_cast<size_t>(waiting)];
  std::string other;
  for (int t = 0; t < threads && other.empty(); ++t) {
    const bool in_mask = t / kWarp == waiting / kWarp && (leader.mask >> t % kWarp & 1);
    const bool named = leader.state == State::kAtBlockBarrier || in_mask;
    if (named && !same_place(fibers[static_cast<size_t>(t)], leader)) other = place_of(t);
  }
  if (other.empty()) other = "it names a lane that is not there";
  message = "divergent threads in block " + std::to_string(blockIdx.x) + ": " + place_of(waiting) + ", " + other;
}

bool run_block(int threads, std::mt19937& random) {
  std::vector<int> turn(static_cast<size_t>(threads));
  for (int t = 0; t < threads; ++t) {
    fibers[static_cast<size_t>(t)].state = State::kReady;
    turn[static_cast<size_t>(t)] = order == kDescending ? threads - 1 - t : t;
  }
  for (;;) {
    if (order == kShuffled) std::shuffle(turn.begin(), turn.end(), random);
    for (const int t : turn) {
      Fiber& f = fibers[static_cast<size_t>(t)];
      if (f.state == State::kReady) resume(f, t);
    }
    bool all_left = true, released = false;
    for (int t = 0; t < threads; ++t) {
      const State state = fibers[static_cast<size_t>(t)].state;
      all_left = all_left && state == State::kLeft;
      if (state == State::kReady) released = true;
      if (state == State::kAtWarp && release_lanes(t / kWarp * kWarp, threads, t)) released = true;
    }
    if (all_left) return true;
    if (!released && !release_block(threads)) {
      report_divergence(threads);
      for (Fiber& f : fibers) f.started = false;  // those in the middle of a kernel never come back
      return false;
    }
  }
}

}  // namespace

int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

void wait_for_block(const char* file, int line) {
  current->state = State::kAtBlockBarrier;
  current->file = file;
  current->line = line;
  yield();
}

uint64_t wait_for_warp(unsigned mask, uint64_t value, int source_lane, const char* file, int line) {
  Fiber& f = *current;
  f.state = State::kAtWarp;
  f.file = file;
  f.line = line;
  f.mask = mask;
  f.value = value;
  f.source = source_lane;
  yield();
  return f.value;
}

const char* error_text() { return message.c_str(); }

int run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  static std::mt19937 random(1);
  if (fibers.size() < static_cast<size_t>(threads)) {
    std::vector<Fiber> more(static_cast<size_t>(threads));
    fibers.swap(more);
  }
  const size_t bytes = static_cast<size_t>(shared_bytes);
  std::unique_ptr<unsigned char, decltype(&free)> memory(
      static_cast<unsigned char*>(aligned_alloc(16, (bytes + kGuard + 15) / 16 * 16)), &free);
  shared_memory = memory.get();
  body = &kernel;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t b = 0; b < blocks; ++b) {
    memset(shared_memory, 0xff, bytes + kGuard);  // NaN in every format
    blockIdx = {static_cast<unsigned>(b), 0, 0};
    if (!run_block(threads, random)) return kFailed;
    for (size_t i = bytes; i < bytes + kGuard; ++i) {
      if (shared_memory[i] == 0xff) continue;
      message = "block " + std::to_string(b) + " wrote past its " + std::to_string(bytes) + " bytes of shared memory";
      return kFailed;
    }
  }
  loaded.end_launch();
  stored.end_launch();
  return 0;
}

void Traffic::end_launch() {
  std::sort(runs.begin(), runs.end());
  uintptr_t end = 0;
  for (const auto& [first, count] : runs) {
    const uintptr_t last = first + count;
    if (last > end) bytes += static_cast<int64_t>(last - std::max(first, end));
    end = std::max(end, last);
  }
  runs.clear();
}

}  // namespace kssm_host

// ---- for the tests ----

#pragma GCC visibility push(default)
extern "C" {
// 0: threads run in ascending order, 1: descending, 2: shuffled anew after every barrier
void kssm_cuda_thread_order(int wanted) { kssm_host::order = wanted; }

// Bytes of global memory that launches have loaded and stored since the last call, each byte once a launch: what is
// read again comes from a cache. The first call starts the counting.
void kssm_cuda_bytes(int64_t* loaded_and_stored) {
  kssm_host::Traffic* const both[2] = {&kssm_host::loaded, &kssm_host::stored};
  for (int i = 0; i < 2; ++i) {
    loaded_and_stored[i] = both[i]->bytes;
    both[i]->bytes = 0;
    both[i]->on = true;
  }
}
}
