// The kernels for a CPU. base.py documents the functions; cpu_cpp.py calls them.
//
// x has shape (n, c, s) in NCHW, where s = H W, or (n s, c) in channels_last. Memory accesses take
// most of the time: moments and sums read their input once; normalize and input_gradient read it
// once and write once. forward and backward do both; in NCHW they process one channel after the
// other, so that the second read often finds the channel in the cache. The order of every sum is
// independent of the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using Index = std::int64_t;

// Number of values in a block. A block is summed in x's own accuracy, the sums of blocks in double.
// A block is small enough for a float sum to keep its digits, and to be read again from the level-1
// cache.
constexpr Index kBlock = 4096;
// In channels_last a block has all channels. Maximum number of its rows, and number of elements,
// which fit into the level-2 cache.
constexpr Index kMaxRows = 256, kBlockElements = 65536;
// Number of first rows of a block whose mean is subtracted before summing.
constexpr Index kHead = 8;
// Parts of channels_last input that are summed independently: maximum number of parts, minimum
// number of elements per part.
constexpr Index kParts = 32, kPartElements = 131072;
// Number of elements below which one thread is faster than several.
constexpr Index kSerial = 32768;

struct BFloat16 {
  std::uint16_t bits;
};

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(BFloat16 v) {
  const std::uint32_t bits = std::uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float v, float& to) { to = v; }
inline void store(double v, double& to) { to = v; }
inline void store(float v, BFloat16& to) {  // rounds to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = std::uint16_t(v == v ? rounded : 0x7fc0);
}

// Count, mean and sum of squared deviations of the values so far (Chan, Golub and LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, deviations = 0;

  void add(double other_count, double other_mean, double other_deviations) {
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    deviations += other_deviations + delta * delta * (count * other_count / total);
    count = total;
  }
};

// Whether a sum in float overflowed (squares beyond 1e38), so that it must be repeated in double.
template <class A>
bool beyond(A sum) {
  return !std::is_same<A, double>::value && !std::isfinite(sum);
}

template <class A>
bool any_beyond(const A* sums, Index c) {
  bool any = false;
  for (Index k = 0; k < c; k++) any |= beyond(sums[k]);
  return any;
}

// Adds a block of `rows` rows, `stride` apart, of `width` contiguous values.
template <class A, class T>
void add_block(Moments& moments, const T* x, Index rows, Index stride, Index width) {
  A sum = 0;
  for (Index i = 0; i < rows; i++) {
    const T* row = x + i * stride;
#pragma omp simd reduction(+ : sum)
    for (Index j = 0; j < width; j++) sum += load(row[j]);
  }
  const double count = double(rows * width);
  const A mean = A(sum / count);
  // The deviations from a rounded mean sum to its rounding error times the count, not to 0.
  A error = 0, squares = 0;
  for (Index i = 0; i < rows; i++) {
    const T* row = x + i * stride;
#pragma omp simd reduction(+ : error, squares)
    for (Index j = 0; j < width; j++) {
      const A d = load(row[j]) - mean;
      error += d;
      squares += d * d;
    }
  }
  if (beyond<A>(squares)) return add_block<double>(moments, x, rows, stride, width);
  const double shift = error / count;
  moments.add(count, mean + shift, squares - shift * error);
}

// Calls f(k) for every channel, in parallel.
template <class F>
void for_channels(Index c, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index k = 0; k < c; k++) f(k);
}

// Calls f(offset, rows, width) for blocks that cover channel k of NCHW input.
template <class F>
void for_blocks(Index n, Index c, Index s, Index k, F f) {
  const Index rows = std::max<Index>(1, kBlock / s), width = std::min(s, kBlock);
  for (Index i = 0; i < n; i += rows)
    for (Index j = 0; j < s; j += width)
      f((i * c + k) * s + j, std::min(rows, n - i), std::min(width, s - j));
}

// Number of rows in a part.
Index part_rows(Index rows, Index c) {
  return std::max((rows + kParts - 1) / kParts, (kPartElements + c - 1) / c);
}

// Number of parts, which does not depend on the number of threads.
Index parts_of(Index rows, Index c) {
  const Index part = part_rows(rows, c);
  return (rows + part - 1) / part;
}

// Calls f(part, first row, rows) for blocks of `rows` rows in channels_last; parts in parallel.
template <class F>
void for_row_blocks(Index rows, Index c, int threads, F f) {
  const Index block = std::clamp<Index>(kBlockElements / c, 8, kMaxRows);
  const Index part = part_rows(rows, c), parts = parts_of(rows, c);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index p = 0; p < parts; p++) {
    const Index end = std::min(rows, (p + 1) * part);
    for (Index i = p * part; i < end; i += block) f(p, i, std::min(block, end - i));
  }
}

// Calls f(i, 4) for every four rows and f(i, 1) for each remaining row. With four rows at a time,
// f loads and stores the sum of a channel once for four values.
template <class F>
void by_rows(Index rows, F f) {
  Index i = 0;
  for (; i + 4 <= rows; i += 4) f(i, std::integral_constant<Index, 4>());
  for (; i < rows; i++) f(i, std::integral_constant<Index, 1>());
}

// Moments of channel k in NCHW.
template <class A, class T>
Moments moments_nchw(const T* x, Index n, Index c, Index s, Index k) {
  Moments moments;
  for_blocks(n, c, s, k, [&](Index at, Index rows, Index width) {
    add_block<A>(moments, x + at, rows, c * s, width);
  });
  return moments;
}

// Moments of c channels.
struct ChannelMoments {
  double count = 0;
  std::vector<double> mean, deviations;

  explicit ChannelMoments(Index c) : mean(c), deviations(c) {}

  // f(k) returns mean and sum of squared deviations of `other_count` further values of channel k.
  template <class F>
  void add(double other_count, F f) {
    const double total = count + other_count, share = other_count / total;
    const double weight = count * share;
    const Index c = Index(mean.size());
#pragma omp simd
    for (Index k = 0; k < c; k++) {
      const std::pair<double, double> other = f(k);
      const double delta = other.first - mean[k];
      mean[k] += delta * share;
      deviations[k] += other.second + delta * delta * weight;
    }
    count = total;
  }
};

// Adds `count` rows of c channels.
template <class A, class T>
void add_rows(ChannelMoments& moments, const T* block, Index count, Index c) {
  // One pass over the block is enough if the mean of its first rows is subtracted: the mean of q
  // values is within sqrt(count / q) standard deviations of the mean of all count values, so the
  // subtraction below (squares - shift * sum) loses few digits.
  std::vector<A> scratch(3 * c);
  A *const center = scratch.data(), *const sum = center + c, *const squares = sum + c;
  const Index head = std::min(kHead, count);
  for (Index i = 0; i < head; i++)
#pragma omp simd
    for (Index k = 0; k < c; k++) center[k] += load(block[i * c + k]) / A(head);
  by_rows(count, [&](Index i, auto some) {
#pragma omp simd
    for (Index k = 0; k < c; k++) {
      A first = 0, second = 0;
      for (Index r = 0; r < some; r++) {
        const A d = load(block[(i + r) * c + k]) - center[k];
        first += d;
        second += d * d;
      }
      sum[k] += first;
      squares[k] += second;
    }
  });
  if (any_beyond(squares, c)) return add_rows<double>(moments, block, count, c);
  const double share = 1.0 / double(count);
  moments.add(double(count), [=](Index k) {
    const double shift = sum[k] * share;
    return std::make_pair(center[k] + shift, squares[k] - shift * sum[k]);
  });
}

// Calls result(k, Moments) for every channel in channels_last.
template <class A, class T, class F>
void moments_last(const T* x, Index rows, Index c, int threads, F result) {
  std::vector<ChannelMoments> parts(parts_of(rows, c), ChannelMoments(c));
  for_row_blocks(rows, c, threads, [&](Index part, Index first, Index count) {
    add_rows<A>(parts[part], x + first * c, count, c);
  });
  ChannelMoments total(c);
  for (const ChannelMoments& m : parts)
    total.add(m.count, [&](Index k) { return std::make_pair(m.mean[k], m.deviations[k]); });
  for (Index k = 0; k < c; k++) result(k, Moments{total.count, total.mean[k], total.deviations[k]});
}

// Calls result(k, Moments) for every channel.
template <class A, class T, class F>
void all_moments(const T* x, Index n, Index c, Index s, bool last, int threads, F result) {
  if (last) return moments_last<A>(x, n * s, c, threads, result);
  for_channels(c, threads, [&](Index k) { result(k, moments_nchw<A>(x, n, c, s, k)); });
}

// Sums of g and of g (x - center) over `rows` rows, `stride` apart, of `width` contiguous values.
template <class A, class T>
std::pair<double, double> block_sums(const T* g, const T* x, A center, Index rows, Index stride,
                                     Index width) {
  A sum_g = 0, sum_gx = 0;
  for (Index i = 0; i < rows; i++) {
    const T *row_g = g + i * stride, *row_x = x + i * stride;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (Index j = 0; j < width; j++) {
      const A v = load(row_g[j]);
      sum_g += v;
      sum_gx += v * (load(row_x[j]) - center);
    }
  }
  if (beyond(sum_gx)) return block_sums<double>(g, x, double(center), rows, stride, width);
  return {sum_g, sum_gx};
}

// Sums of channel k in NCHW.
template <class T, class A>
void sums_nchw(const T* g, const T* x, Index n, Index c, Index s, Index k, const A* mean,
               const A* invstd, A* sum_g, A* sum_g_xhat) {
  double total_g = 0, total_gx = 0;
  for_blocks(n, c, s, k, [&](Index at, Index rows, Index width) {
    const auto sums = block_sums<A>(g + at, x + at, mean[k], rows, c * s, width);
    total_g += sums.first;
    total_gx += sums.second;
  });
  sum_g[k] = A(total_g);
  sum_g_xhat[k] = A(total_gx * invstd[k]);
}

// Adds the sums of `count` rows of c channels to into[0..c) and into[c..2c).
template <class A, class T, class M>
void add_row_sums(double* into, const T* g, const T* x, Index count, Index c, const M* mean) {
  std::vector<A> scratch(2 * c);
  A *const part_g = scratch.data(), *const part_gx = part_g + c;
  by_rows(count, [&](Index i, auto some) {
    const Index at = i * c;
#pragma omp simd
    for (Index k = 0; k < c; k++) {
      A sum_g = 0, sum_gx = 0;
      for (Index r = 0; r < some; r++) {
        const A v = load(g[at + r * c + k]);
        sum_g += v;
        sum_gx += v * (load(x[at + r * c + k]) - A(mean[k]));
      }
      part_g[k] += sum_g;
      part_gx[k] += sum_gx;
    }
  });
  if (any_beyond(part_gx, c)) return add_row_sums<double>(into, g, x, count, c, mean);
  for (Index k = 0; k < 2 * c; k++) into[k] += scratch[k];
}

template <class T, class A>
void sums_last(const T* g, const T* x, Index rows, Index c, const A* mean, const A* invstd,
               A* sum_g, A* sum_g_xhat, int threads) {
  const Index part_count = parts_of(rows, c);
  std::vector<double> parts(2 * part_count * c);
  for_row_blocks(rows, c, threads, [&](Index part, Index first, Index count) {
    add_row_sums<A>(parts.data() + 2 * part * c, g + first * c, x + first * c, count, c, mean);
  });
  for (Index k = 0; k < c; k++) {
    double total_g = 0, total_gx = 0;
    for (Index p = 0; p < part_count; p++) {
      total_g += parts[2 * p * c + k];
      total_gx += parts[(2 * p + 1) * c + k];
    }
    sum_g[k] = A(total_g);
    sum_g_xhat[k] = A(total_gx * invstd[k]);
  }
}

// Sets out[i] to f(i, k) in channel k of NCHW. Not inlined, because the compiler does not always
// vectorize the inlined loop.
template <class T, class F>
__attribute__((noinline)) void map_nchw(T* out, Index n, Index c, Index s, Index k, F f) {
  for (Index i = 0; i < n; i++) {
    const Index at = (i * c + k) * s;
#pragma omp simd
    for (Index j = at; j < at + s; j++) store(f(j, k), out[j]);
  }
}

// Sets out[i] to f(i, channel) for all elements in channels_last.
template <class T, class F>
void map_last(T* out, Index rows, Index c, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index i = 0; i < rows; i++)
#pragma omp simd
    for (Index k = 0; k < c; k++) store(f(i * c + k, k), out[i * c + k]);
}

template <class T, class F>
void map(T* out, Index n, Index c, Index s, bool last, int threads, F f) {
  if (last) return map_last(out, n * s, c, threads, f);
  for_channels(c, threads, [&](Index k) { map_nchw(out, n, c, s, k, f); });
}

template <class T, class A>
auto normalized(const T* x, const A* mean, const A* scale, const A* bias) {
  return [=](Index i, Index k) { return (load(x[i]) - mean[k]) * scale[k] + bias[k]; };
}

template <class T, class A>
auto gradient(const T* g, const T* x, const A* center, const A* scale, const A* mean_g,
              const A* slope) {
  return [=](Index i, Index k) {
    return scale[k] * ((load(g[i]) - mean_g[k]) - slope[k] * (load(x[i]) - center[k]));
  };
}

template <class T, class A>
void forward(const T* x, Index n, Index c, Index s, bool last, int threads, const A* ref_mean,
             const A* ref_var, const A* weight, const A* bias, double lambda1, double eps,
             A* batch_mean, A* mean, A* var, A* invstd, T* y) {
  std::vector<A> scale(c), shift(c);
  const auto mix = [&](Index k, const Moments& m) {
    const double own = m.deviations / m.count;
    const double mixed = own + lambda1 * (ref_var[k] - own);  // eq. 16
    batch_mean[k] = A(m.mean);
    mean[k] = A(m.mean + lambda1 * (ref_mean[k] - m.mean));  // eq. 15
    // Bessel's correction applies to the batch variance only: the reference is a constant.
    var[k] = A(mixed + (1 - lambda1) * own / std::max(m.count - 1, 1.0));
    invstd[k] = A(1 / std::sqrt(mixed + eps));
    scale[k] = weight ? weight[k] * invstd[k] : invstd[k];
    shift[k] = bias ? bias[k] : A(0);
  };
  const auto f = normalized(x, mean, scale.data(), shift.data());
  if (last) {
    moments_last<A>(x, n * s, c, threads, mix);
    return map_last(y, n * s, c, threads, f);
  }
  for_channels(c, threads, [&](Index k) {
    mix(k, moments_nchw<A>(x, n, c, s, k));
    map_nchw(y, n, c, s, k, f);
  });
}

template <class T, class A>
void backward(const T* x, Index n, Index c, Index s, bool last, int threads, const T* g,
              const A* weight, const A* batch_mean, const A* mean, const A* invstd, double share,
              A* sum_g, A* sum_g_xhat, T* dx) {
  std::vector<A> scale(c), mean_g(c), slope(c);
  const auto f = gradient(g, x, batch_mean, scale.data(), mean_g.data(), slope.data());
  const auto prepare = [&](Index k) {
    scale[k] = weight ? weight[k] * invstd[k] : invstd[k];
    mean_g[k] = A(sum_g[k] * share);
    slope[k] = A(invstd[k] * sum_g_xhat[k] * share);
  };
  if (last) {
    sums_last(g, x, n * s, c, mean, invstd, sum_g, sum_g_xhat, threads);
    for (Index k = 0; k < c; k++) prepare(k);
    return map_last(dx, n * s, c, threads, f);
  }
  for_channels(c, threads, [&](Index k) {
    sums_nchw(g, x, n, c, s, k, mean, invstd, sum_g, sum_g_xhat);
    prepare(k);
    map_nchw(dx, n, c, s, k, f);
  });
}

int threads_for(Index elements, int threads) { return elements < kSerial ? 1 : threads; }

}  // namespace

// One extern "C" function for every kernel and type. cpu_cpp.py has the same names of the types.
#define KERNELS(NAME, T, A)                                                                      \
  extern "C" void moments_##NAME(const T* x, Index n, Index c, Index s, bool last, int threads,  \
                                 A* mean, A* var) {                                              \
    all_moments<A>(x, n, c, s, last, threads_for(n * c * s, threads),                            \
                   [=](Index k, const Moments& m) {                                              \
                     mean[k] = A(m.mean);                                                        \
                     var[k] = A(m.deviations / m.count);                                         \
                   });                                                                           \
  }                                                                                              \
  extern "C" void sums_##NAME(const T* x, Index n, Index c, Index s, bool last, int threads,     \
                              const T* g, const A* mean, const A* invstd, A* sum_g,              \
                              A* sum_g_xhat) {                                                   \
    threads = threads_for(n * c * s, threads);                                                   \
    if (last) return sums_last(g, x, n * s, c, mean, invstd, sum_g, sum_g_xhat, threads);        \
    for_channels(c, threads, [=](Index k) {                                                      \
      sums_nchw(g, x, n, c, s, k, mean, invstd, sum_g, sum_g_xhat);                              \
    });                                                                                          \
  }                                                                                              \
  extern "C" void normalize_##NAME(const T* x, Index n, Index c, Index s, bool last,             \
                                   int threads, const A* mean, const A* scale, const A* bias,    \
                                   T* y) {                                                       \
    map(y, n, c, s, last, threads_for(n * c * s, threads), normalized(x, mean, scale, bias));    \
  }                                                                                              \
  extern "C" void input_gradient_##NAME(const T* x, Index n, Index c, Index s, bool last,        \
                                        int threads, const T* g, const A* center,                \
                                        const A* scale, const A* mean_g, const A* slope,         \
                                        T* dx) {                                                 \
    map(dx, n, c, s, last, threads_for(n * c * s, threads),                                      \
        gradient(g, x, center, scale, mean_g, slope));                                           \
  }                                                                                              \
  extern "C" void forward_##NAME(                                                                \
      const T* x, Index n, Index c, Index s, bool last, int threads, const A* ref_mean,          \
      const A* ref_var, const A* weight, const A* bias, double lambda1, double eps,              \
      A* batch_mean, A* mean, A* var, A* invstd, T* y) {                                         \
    forward(x, n, c, s, last, threads_for(n * c * s, threads), ref_mean, ref_var, weight, bias,  \
            lambda1, eps, batch_mean, mean, var, invstd, y);                                     \
  }                                                                                              \
  extern "C" void backward_##NAME(                                                               \
      const T* x, Index n, Index c, Index s, bool last, int threads, const T* g,                 \
      const A* weight, const A* batch_mean, const A* mean, const A* invstd, double share,        \
      A* sum_g, A* sum_g_xhat, T* dx) {                                                          \
    backward(x, n, c, s, last, threads_for(n * c * s, threads), g, weight, batch_mean, mean,     \
             invstd, share, sum_g, sum_g_xhat, dx);                                              \
  }

KERNELS(float, float, float)
KERNELS(double, double, double)
KERNELS(bfloat16, BFloat16, float)
