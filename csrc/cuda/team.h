// The threads that work one row of oscillators, or a block of one: 8, 16 or 32 lanes of a warp, or a block of 64,
// 128 or 256 threads. Every thread of a block takes the same way through a kernel, so that shuffles and barriers name
// whole warps and blocks; a team without a row works one of no elements.
//
// Which team a row gets depends on the row's length alone and every sum has a fixed order: a row's bits depend neither
// on the batch nor on its neighbours.
#pragma once

#include "storage.h"

KSSM_NAMESPACE_BEGIN

constexpr int kMaxLanes = 256, kWarp = 32, kMaxWarps = kMaxLanes / kWarp;
constexpr int64_t kThreads = 128;       // of a block of several teams
constexpr int64_t kEnoughBlocks = 264;  // two for each multiprocessor of an H100; below it, smaller blocks reach more
constexpr unsigned kAllLanes = 0xffffffffu;

// Launch bounds as a limit on registers: a multiprocessor has 65536 for as many threads as are promised room. Below
// what a kernel needs the compiler spills, and without the promise of one block it may do so for an occupancy it likes
// better (-Xptxas -v shows both).
constexpr int kRegisters64 = 1024, kRegisters96 = 640, kRegisters128 = 512, kRegisters168 = 384, kRegisters255 = 256;

struct Team {
  KSSM_DEVICE explicit Team(int lanes_of_team)
      : lanes(lanes_of_team), rank(static_cast<int>(threadIdx.x) & (lanes_of_team - 1)),
        index(static_cast<int>(threadIdx.x) / lanes_of_team), teams(static_cast<int>(blockDim.x) / lanes_of_team) {}
  KSSM_DEVICE void sync() const {
    if (lanes > kWarp) __syncthreads();
    else __syncwarp();
  }
  KSSM_DEVICE int warps() const { return lanes > kWarp ? lanes / kWarp : 1; }
  KSSM_DEVICE int warp() const { return rank / kWarp; }
  // this team's number in the grid
  KSSM_DEVICE int64_t number() const { return static_cast<int64_t>(blockIdx.x) * teams + index; }

  int lanes, rank, index, teams;  // rank: of this thread in its team; index: of the team in its block
};

// Blocks of teams for `units` rows or row blocks; host code.
struct Shape {
  Shape(int lanes_of_team, int64_t units, int64_t bytes_per_team) : lanes(lanes_of_team) {
    int64_t teams = lanes <= kWarp ? kThreads / lanes : 1;
    const auto blocks_of = [&] { return (units + teams - 1) / teams; };
    while (teams * lanes > kWarp && teams > 1 && (teams * bytes_per_team > kSharedBytes || blocks_of() < kEnoughBlocks))
      teams /= 2;
    threads = static_cast<int>(teams * lanes);
    shared = teams * bytes_per_team;
    blocks = blocks_of();
  }
  int lanes, threads;
  int64_t shared, blocks;
};

// Tests set it; 0: by the row's length.
inline int forced_lanes = 0;

// The smallest team whose lanes get at most `per_lane` elements, from 8 lanes up to `most`.
inline int lanes_for(int64_t n, int64_t per_lane, int most) {
  int lanes = 8;
  while (lanes < most && n > lanes * per_lane) lanes *= 2;
  return lanes;
}

// A team whose threads hold eight elements each; 0: the row is too long.
inline int fused_lanes(int64_t n) {
  const int lanes = forced_lanes ? forced_lanes : lanes_for(n, 8, kMaxLanes);
  return n <= int64_t{8} * lanes ? lanes : 0;
}

// ---- sums over a team ----

template <class T> KSSM_DEVICE T shuffle_xor(T x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }

constexpr int kMostSums = 4;
template <class T> KSSM_FN int64_t team_sum_bytes(int lanes) {
  return lanes > kWarp ? 2 * kMostSums * kMaxWarps * static_cast<int64_t>(sizeof(T)) : 0;
}

// x[k] = the sum over the team, in all its threads. `warps`: team_sum_bytes of shared memory, in two halves used in
// turn, so that one barrier is enough.
template <class T, int K> KSSM_DEVICE void team_sum(const Team& team, T (&x)[K], T* warps, int& turn) {
  KSSM_UNROLL
  for (int offset = 1; offset < kWarp; offset *= 2) {
    if (offset >= team.lanes) break;
    KSSM_UNROLL
    for (int k = 0; k < K; ++k) x[k] += shuffle_xor(x[k], offset);
  }
  if (team.lanes <= kWarp) return;
  static_assert(K <= kMostSums, "room in shared memory");
  T* const half = warps + turn * kMostSums * kMaxWarps;
  turn ^= 1;
  if (team.rank % kWarp == 0) {
    KSSM_UNROLL
    for (int k = 0; k < K; ++k) half[team.warp() * K + k] = x[k];
  }
  __syncthreads();
  KSSM_UNROLL
  for (int k = 0; k < K; ++k) x[k] = half[k];
  for (int w = 1; w < team.warps(); ++w) {
    KSSM_UNROLL
    for (int k = 0; k < K; ++k) x[k] += half[w * K + k];
  }
}

// One step of a sum of many numbers, transposing as it adds: of FROM numbers lanes exchange halves, and keep one each.
// count of those a lane holds are meant, from number `first` on.
template <int FROM, class T, int N> KSSM_DEVICE void exchange_halves(T (&x)[N], int offset, int& first, int& count) {
  constexpr int HALF = (FROM + 1) / 2;
  const bool upper = threadIdx.x & static_cast<unsigned>(offset);
  KSSM_UNROLL
  for (int i = 0; i < HALF; ++i) {
    const T low = x[i], high = i + HALF < FROM ? x[i + HALF] : T(0);
    x[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, offset);
  }
  first += upper ? HALF : 0;
  count = upper ? count - HALF : count < HALF ? count : HALF;
}

template <int MOST, class T, int N> KSSM_DEVICE void write_some(const T (&x)[N], int first, int count, T* out) {
  KSSM_UNROLL
  for (int i = 0; i < MOST; ++i)
    if (i < count) out[first + i] = x[i];
}

// warps[w N + k] = the sum of x[k] over warp w of the team, by about one shuffle for each number, not one for each
// number and step.
template <class T, int N> KSSM_DEVICE void warp_sums(const Team& team, T (&x)[N], T* warps) {
  constexpr int n1 = (N + 1) / 2, n2 = (n1 + 1) / 2, n4 = (n2 + 1) / 2, n8 = (n4 + 1) / 2, n16 = (n8 + 1) / 2;
  int first = 0, count = N;
  exchange_halves<N>(x, 1, first, count);
  exchange_halves<n1>(x, 2, first, count);
  exchange_halves<n2>(x, 4, first, count);
  T* const out = warps + team.warp() * N;
  if (team.lanes == 8) return write_some<n4>(x, first, count, out);
  exchange_halves<n4>(x, 8, first, count);
  if (team.lanes == 16) return write_some<n8>(x, first, count, out);
  exchange_halves<n8>(x, 16, first, count);
  write_some<n16>(x, first, count, out);
}

KSSM_NAMESPACE_END
