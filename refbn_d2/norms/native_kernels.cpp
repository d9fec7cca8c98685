// The kernels of functional.py for a CPU; native_kernels.py compiles this file and says what they do.
//
// x is (n, c, s), s = H W pixels of a channel side by side, or in channels_last (n s, c). Nothing is
// as expensive as memory: moments and sums read their input once, normalize and input_gradient read
// it once more and write. Every sum has the same order whatever the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using Index = std::int64_t;

// What a sum in x's own accuracy runs over, before it goes on in double: few enough values to lose
// no digits, and few enough to be found in the first cache when they are read again.
constexpr Index kBlock = 4096;
// In channels_last a block has all channels: rows, and elements in the second cache.
constexpr Index kMaxRows = 256, kBlockElements = 65536;
// Parts of channels_last input that are summed independently: more would not be found faster.
constexpr Index kParts = 32, kMinRows = 64;
// Less than this is not worth waking other threads for.
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
inline void store(float v, BFloat16& to) {  // to the nearest, halves to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = std::uint16_t(v == v ? rounded : 0x7fc0);
}

// Mean and sum of squared deviations of values seen so far (Chan, Golub and LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, deviations = 0;

  void add(double other_count, double other_mean, double other_deviations) {
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    deviations += other_deviations + delta * delta * (count * other_count / total);
    count = total;
  }
};

// `rows` runs of `width` neighbors, `stride` apart.
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
  // Deviations from a rounded mean do not add up to 0: what they add up to is its error.
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
  const double shift = error / count;
  moments.add(count, mean + shift, squares - shift * error);
}

// Calls f(offset, rows, width) for blocks that cover channel k of NCHW input.
template <class F>
void for_blocks(Index n, Index c, Index s, Index k, F f) {
  const Index rows = std::max<Index>(1, kBlock / s), width = std::min(s, kBlock);
  for (Index i = 0; i < n; i += rows)
    for (Index j = 0; j < s; j += width)
      f((i * c + k) * s + j, std::min(rows, n - i), std::min(width, s - j));
}

// Calls f(part, first row, rows) for blocks of `rows` rows in channels_last; parts in parallel.
template <class F>
void for_row_blocks(Index rows, Index c, int threads, F f) {
  const Index block = std::clamp<Index>(kBlockElements / c, 8, kMaxRows);
  const Index part = std::max<Index>(kMinRows, (rows + kParts - 1) / kParts);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index p = 0; p < kParts; p++) {
    const Index end = std::min(rows, (p + 1) * part);
    for (Index i = p * part; i < end; i += block) f(p, i, std::min(block, end - i));
  }
}

// Calls f(i, 4) for every four rows, f(i, 1) for the rest: four at a time load and store a channel's
// sum once.
template <class F>
void by_rows(Index rows, F f) {
  Index i = 0;
  for (; i + 4 <= rows; i += 4) f(i, std::integral_constant<Index, 4>());
  for (; i < rows; i++) f(i, std::integral_constant<Index, 1>());
}

template <class T, class A>
void moments_nchw(const T* x, Index n, Index c, Index s, A* mean, A* var, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index k = 0; k < c; k++) {
    Moments moments;
    for_blocks(n, c, s, k, [&](Index at, Index rows, Index width) {
      add_block<A>(moments, x + at, rows, c * s, width);
    });
    mean[k] = A(moments.mean);
    var[k] = A(moments.deviations / moments.count);
  }
}

// The same for c channels side by side.
struct ChannelMoments {
  double count = 0;
  std::vector<double> mean, deviations;

  explicit ChannelMoments(Index c) : mean(c), deviations(c) {}

  // f(k) is mean and deviations of `other_count` further values of channel k.
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

template <class T, class A>
void moments_last(const T* x, Index rows, Index c, A* mean, A* var, int threads) {
  std::vector<ChannelMoments> parts(kParts, ChannelMoments(c));
  for_row_blocks(rows, c, threads, [&](Index part, Index first, Index count) {
    std::vector<A> scratch(3 * c);
    A *const center = scratch.data(), *const error = center + c, *const squares = error + c;
    const T* const block = x + first * c;
    by_rows(count, [&](Index i, auto some) {
#pragma omp simd
      for (Index k = 0; k < c; k++) {
        A sum = 0;
        for (Index r = 0; r < some; r++) sum += load(block[(i + r) * c + k]);
        center[k] += sum;
      }
    });
    const A share = A(1) / A(count);
    for (Index k = 0; k < c; k++) center[k] *= share;
    by_rows(count, [&](Index i, auto some) {
#pragma omp simd
      for (Index k = 0; k < c; k++) {
        A first = 0, second = 0;
        for (Index r = 0; r < some; r++) {
          const A d = load(block[(i + r) * c + k]) - center[k];
          first += d;
          second += d * d;
        }
        error[k] += first;
        squares[k] += second;
      }
    });
    parts[part].add(double(count), [=](Index k) {
      const double shift = double(error[k]) * share;
      return std::make_pair(center[k] + shift, squares[k] - shift * error[k]);
    });
  });
  ChannelMoments total(c);
  for (const ChannelMoments& m : parts)
    if (m.count > 0)
      total.add(m.count, [&](Index k) { return std::make_pair(m.mean[k], m.deviations[k]); });
  for (Index k = 0; k < c; k++) {
    mean[k] = A(total.mean[k]);
    var[k] = A(total.deviations[k] / total.count);
  }
}

template <class T, class A>
void sums_nchw(const T* g, const T* x, Index n, Index c, Index s, const A* mean, const A* invstd,
               A* sum_g, A* sum_g_xhat, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index k = 0; k < c; k++) {
    const A center = mean[k];
    double total_g = 0, total_gx = 0;
    for_blocks(n, c, s, k, [&](Index at, Index rows, Index width) {
      A part_g = 0, part_gx = 0;
      for (Index i = 0; i < rows; i++) {
        const T *row_g = g + at + i * c * s, *row_x = x + at + i * c * s;
#pragma omp simd reduction(+ : part_g, part_gx)
        for (Index j = 0; j < width; j++) {
          const A v = load(row_g[j]);
          part_g += v;
          part_gx += v * (load(row_x[j]) - center);
        }
      }
      total_g += part_g;
      total_gx += part_gx;
    });
    sum_g[k] = A(total_g);
    sum_g_xhat[k] = A(total_gx * invstd[k]);
  }
}

template <class T, class A>
void sums_last(const T* g, const T* x, Index rows, Index c, const A* mean, const A* invstd,
               A* sum_g, A* sum_g_xhat, int threads) {
  std::vector<double> parts(2 * kParts * c);
  for_row_blocks(rows, c, threads, [&](Index part, Index first, Index count) {
    std::vector<A> scratch(2 * c);
    A *const part_g = scratch.data(), *const part_gx = part_g + c;
    by_rows(count, [&](Index i, auto some) {
      const Index at = (first + i) * c;
#pragma omp simd
      for (Index k = 0; k < c; k++) {
        A sum_g = 0, sum_gx = 0;
        for (Index r = 0; r < some; r++) {
          const A v = load(g[at + r * c + k]);
          sum_g += v;
          sum_gx += v * (load(x[at + r * c + k]) - mean[k]);
        }
        part_g[k] += sum_g;
        part_gx[k] += sum_gx;
      }
    });
    double* const into = parts.data() + 2 * part * c;
    for (Index k = 0; k < 2 * c; k++) into[k] += scratch[k];
  });
  for (Index k = 0; k < c; k++) {
    double total_g = 0, total_gx = 0;
    for (Index p = 0; p < kParts; p++) {
      total_g += parts[2 * p * c + k];
      total_gx += parts[(2 * p + 1) * c + k];
    }
    sum_g[k] = A(total_g);
    sum_g_xhat[k] = A(total_gx * invstd[k]);
  }
}

// Sets out[i] to f(i, channel) everywhere.
template <class T, class F>
void map(T* out, Index n, Index c, Index s, bool last, int threads, F f) {
  if (last) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index i = 0; i < n * s; i++)
#pragma omp simd
      for (Index k = 0; k < c; k++) store(f(i * c + k, k), out[i * c + k]);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index r = 0; r < n * c; r++) {
      const Index k = r % c;
#pragma omp simd
      for (Index j = r * s; j < (r + 1) * s; j++) store(f(j, k), out[j]);
    }
  }
}

int threads_for(Index elements, int threads) { return elements < kSerial ? 1 : threads; }

}  // namespace

// One function of C for every kernel and type; the types' names are in native_kernels.py.
#define KERNELS(NAME, T, A)                                                                      \
  extern "C" void moments_##NAME(const T* x, Index n, Index c, Index s, bool last, int threads,  \
                                 A* mean, A* var) {                                              \
    threads = threads_for(n * c * s, threads);                                                   \
    if (last)                                                                                    \
      moments_last(x, n * s, c, mean, var, threads);                                             \
    else                                                                                         \
      moments_nchw(x, n, c, s, mean, var, threads);                                              \
  }                                                                                              \
  extern "C" void sums_##NAME(const T* x, Index n, Index c, Index s, bool last, int threads,     \
                              const T* g, const A* mean, const A* invstd, A* sum_g,              \
                              A* sum_g_xhat) {                                                   \
    threads = threads_for(n * c * s, threads);                                                   \
    if (last)                                                                                    \
      sums_last(g, x, n * s, c, mean, invstd, sum_g, sum_g_xhat, threads);                       \
    else                                                                                         \
      sums_nchw(g, x, n, c, s, mean, invstd, sum_g, sum_g_xhat, threads);                        \
  }                                                                                              \
  extern "C" void normalize_##NAME(const T* x, Index n, Index c, Index s, bool last,             \
                                   int threads, const A* mean, const A* scale, const A* bias,    \
                                   T* y) {                                                       \
    map(y, n, c, s, last, threads_for(n * c * s, threads), [=](Index i, Index k) {               \
      return (load(x[i]) - mean[k]) * scale[k] + bias[k];                                        \
    });                                                                                          \
  }                                                                                              \
  extern "C" void input_gradient_##NAME(const T* x, Index n, Index c, Index s, bool last,        \
                                        int threads, const T* g, const A* center,                \
                                        const A* scale, const A* mean_g, const A* slope,         \
                                        T* dx) {                                                 \
    map(dx, n, c, s, last, threads_for(n * c * s, threads), [=](Index i, Index k) {              \
      return scale[k] * ((load(g[i]) - mean_g[k]) - slope[k] * (load(x[i]) - center[k]));        \
    });                                                                                          \
  }

KERNELS(float, float, float)
KERNELS(double, double, double)
KERNELS(bfloat16, BFloat16, float)
