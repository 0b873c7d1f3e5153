// One source, two machines: CUDA threads on a GPU, or one host thread that plays them all.
//
// A kernel is written as phases. FOR_THREADS(t) { ... } is one thread's work followed by a barrier
// on a GPU; on the host it is a loop over all threads of the block, in an order chosen at run
// time. Between phases only shared memory lives on, so what a phase reads was written in an
// earlier one; a result that depends on the order means that a barrier is missing.
//
// No standard header is included on a GPU: NVRTC has none. Compiled there with -fmad=false, and
// on the host with -ffp-contract=off: results must not depend on who contracts a product. CuPy adds
// -ftz=true, under which plain casts between f32 and f64 lose denormals: use `widened`, `narrowed`.
typedef signed char i8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define TABLE static __constant__ const
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define BLOCK_X static_cast<i32>(blockIdx.x)
#define BLOCK_Y static_cast<i32>(blockIdx.y)
// 1024 threads on a multiprocessor, hence at most 64 registers each.
#define KERNEL(name, threads, ...) \
  extern "C" __global__ void __launch_bounds__(threads, 1024 / threads) name(__VA_ARGS__)
#define FOR_THREADS(t) \
  for (i32 t = static_cast<i32>(threadIdx.x), go_ = 1; go_ != 0; go_ = 0, __syncthreads())

// x, but the compiler cannot tell: nothing that depends on it is moved out of a loop.
DEVICE i32 opaque(i32 x) {
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE f64 widened(f32 a) {
  f64 value;
  asm("cvt.f64.f32 %0, %1;" : "=d"(value) : "f"(a));
  return value;
}
DEVICE f32 narrowed(f64 a) {
  f32 value;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(value) : "d"(a));
  return value;
}
DEVICE u32 smaller(u32 a, u32 b) { return min(a, b); }
DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE i32 high_product(i32 a, i32 b) { return __mulhi(a, b); }
DEVICE u64 high_product(u64 a, u64 b) { return __umul64hi(a, b); }
DEVICE u32 bits_set(u32 a) { return static_cast<u32>(__popc(a)); }
DEVICE f64 square_root(f64 a) { return __dsqrt_rn(a); }
DEVICE f64 nearest(f64 a) { return rint(a); }
DEVICE u64 bits_of(f64 a) { return static_cast<u64>(__double_as_longlong(a)); }
DEVICE f64 double_of(u64 a) { return __longlong_as_double(static_cast<i64>(a)); }

#else

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define DEVICE [[maybe_unused]] static inline
#define TABLE static const
#define SHARED
#define UNROLL
#define BLOCK_X emulation::block_x
#define BLOCK_Y emulation::block_y
#define KERNEL(name, threads, ...)                                        \
  static void name##_block(__VA_ARGS__);                                  \
  extern "C" void name(i32 grid_x, i32 grid_y, void** arguments) {        \
    emulation::run(name##_block, threads, grid_x, grid_y, arguments);     \
  }                                                                       \
  static void name##_block(__VA_ARGS__)
#define FOR_THREADS(t) for (i32 t : emulation::order)

namespace emulation {

static thread_local i32 block_x, block_y;
static thread_local std::vector<i32> order;
static i32 chosen_order = 0;

template <class... T, std::size_t... I>
void call(void (*block)(T...), void** arguments, std::index_sequence<I...>) {
  block(*static_cast<T*>(arguments[I])...);
}

template <class... T>
void run(void (*block)(T...), i32 threads, i32 grid_x, i32 grid_y, void** arguments) {
  order.resize(threads);
  std::iota(order.begin(), order.end(), 0);
  if (chosen_order == 1) std::reverse(order.begin(), order.end());
  if (chosen_order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(chosen_order));
  for (block_y = 0; block_y < grid_y; ++block_y)
    for (block_x = 0; block_x < grid_x; ++block_x)
      call(block, arguments, std::index_sequence_for<T...>());
}

}  // namespace emulation

// 0: threads run first to last; 1: last to first; more: shuffled by that seed.
extern "C" void choose_order(i32 order) { emulation::chosen_order = order; }

DEVICE i32 opaque(i32 x) { return x; }
DEVICE f64 widened(f32 a) { return static_cast<f64>(a); }
DEVICE f32 narrowed(f64 a) { return static_cast<f32>(a); }
DEVICE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
DEVICE i32 min(i32 a, i32 b) { return a < b ? a : b; }
DEVICE u32 high_product(u32 a, u32 b) {
  return static_cast<u32>(static_cast<u64>(a) * b >> 32);
}
DEVICE i32 high_product(i32 a, i32 b) {
  return static_cast<i32>(static_cast<i64>(a) * b >> 32);
}
DEVICE u64 high_product(u64 a, u64 b) {
  return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
}
DEVICE u32 bits_set(u32 a) { return static_cast<u32>(__builtin_popcount(a)); }
DEVICE f64 square_root(f64 a) { return std::sqrt(a); }
DEVICE f64 nearest(f64 a) { return std::nearbyint(a); }
DEVICE u64 bits_of(f64 a) {
  u64 bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
DEVICE f64 double_of(u64 a) {
  f64 value;
  std::memcpy(&value, &a, sizeof value);
  return value;
}

#endif
