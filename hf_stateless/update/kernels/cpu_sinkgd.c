/* One SinkGD step of a matrix on a CPU: W <- decay W - step_size diag(r) G diag(c), r and c of SR-Sinkhorn(G).

Each iteration reads G or its squares once: the sums of a few rows are taken, and their share of the column sums added,
while these rows are in the fastest cache. Column sums are added up in blocks of 64 rows first, and row sums in chunks
of 8192 columns: one long sum in float32 would lose digits. Matrices are contiguous, (m, n). */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ROWS = 4, BLOCK = 64, CHUNK = 8192 };
enum { DONE = 0, LEFT_ALONE = 1 };

static inline float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float load_f32(const void *p, int64_t i) { return ((const float *)p)[i]; }
static inline float load_bf16(const void *p, int64_t i) { return of_bits((uint32_t)((const uint16_t *)p)[i] << 16); }

static inline void store_f32(void *p, int64_t i, float x, uint32_t noise) { ((float *)p)[i] = x; }
static inline void store_stochastic(void *p, int64_t i, float x, uint32_t noise) {
    ((uint16_t *)p)[i] = (uint16_t)((bits_of(x) + noise) >> 16);
}
static inline void store_nearest(void *p, int64_t i, float x, uint32_t noise) {
    uint32_t bits = bits_of(x), nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    ((uint16_t *)p)[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : nearest);
}

/* The hash of `rounding.py`, with products that wrap and arithmetic shifts. */
static inline int32_t mix(int32_t x) {
    x ^= x >> 16, x = (int32_t)((uint32_t)x * 0x7FEB352Du);
    x ^= x >> 15, x = (int32_t)((uint32_t)x * 0x846CA68Bu);
    return x ^ (x >> 16);
}
static const uint32_t GOLDEN = 0x9E3779B9u;

/* Odd hashes of m rows and n columns, of which `rounding_noise` is made. */
static void hash_indices(int32_t *hashes, int64_t m, int64_t n, int32_t key) {
    for (int64_t i = 0; i < m; i++) hashes[i] = mix(mix((int32_t)((uint32_t)i * GOLDEN)) ^ key) | 1;
    key = (int32_t)((uint32_t)key + GOLDEN);
    for (int64_t j = 0; j < n; j++) hashes[m + j] = mix(mix((int32_t)((uint32_t)j * GOLDEN)) ^ key) | 1;
}

/* Write the squares of some rows of scale G, and their sums. */
#define SQUARE(NAME, LOAD)                                                                              \
    static void NAME(const void *grad, int64_t first, int64_t rows, int64_t n, float scale, float *squares, \
                     float *sums) {                                                                     \
        for (int64_t i = 0; i < rows; i++) {                                                            \
            const int64_t at = (first + i) * n;                                                         \
            sums[i] = 0;                                                                                \
            for (int64_t from = 0, to; from < n; from = to) {                                           \
                float sum = 0;                                                                          \
                to = from + CHUNK < n ? from + CHUNK : n;                                               \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t j = from; j < to; j++) {            \
                    const float x = LOAD(grad, at + j) * scale;                                         \
                    squares[i * n + j] = x * x;                                                         \
                    sum += x * x;                                                                       \
                }                                                                                       \
                sums[i] += sum;                                                                         \
            }                                                                                           \
        }                                                                                               \
    }
SQUARE(square_f32, load_f32)
SQUARE(square_bf16, load_bf16)

static void weigh_rows(const float *squares, int64_t rows, int64_t n, const float *v, float *sums) {
    for (int64_t i = 0; i < rows; i++) sums[i] = 0;
    for (int64_t from = 0, to; from < n; from = to) {
        to = from + CHUNK < n ? from + CHUNK : n;
        if (rows == ROWS) {
            const float *a = squares, *b = a + n, *c = b + n, *d = c + n;
            float p = 0, q = 0, r = 0, s = 0;
#pragma omp simd reduction(+ : p, q, r, s)
            for (int64_t j = from; j < to; j++) {
                p += a[j] * v[j], q += b[j] * v[j], r += c[j] * v[j], s += d[j] * v[j];
            }
            sums[0] += p, sums[1] += q, sums[2] += r, sums[3] += s;
            continue;
        }
        for (int64_t i = 0; i < rows; i++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = from; j < to; j++) sum += squares[i * n + j] * v[j];
            sums[i] += sum;
        }
    }
}

static void add_columns(const float *squares, int64_t rows, int64_t n, const float *u, float *columns) {
    if (rows == ROWS) {
        const float *a = squares, *b = a + n, *c = b + n, *d = c + n;
        const float p = u[0], q = u[1], r = u[2], s = u[3];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) columns[j] += (a[j] * p + b[j] * q) + (c[j] * r + d[j] * s);
        return;
    }
    for (int64_t i = 0; i < rows; i++) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) columns[j] += squares[i * n + j] * u[i];
    }
}

static void fold(float *block, float *columns, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) columns[j] += block[j], block[j] = 0;
}

#define APPLY(NAME, LOAD_GRAD, LOAD, STORE)                                                              \
    static void NAME(const void *grad, void *weight, int64_t i, int64_t n, float r, const float *c,      \
                     float step_size, float decay, uint32_t row_hash, const int32_t *column_hash) {      \
        _Pragma("omp simd") for (int64_t j = 0; j < n; j++) {                                            \
            const int64_t at = i * n + j;                                                                \
            const float x = LOAD(weight, at) * decay - step_size * (LOAD_GRAD(grad, at) * r * c[j]);     \
            const int32_t noise = (int32_t)(row_hash * (uint32_t)(column_hash ? column_hash[j] : 0));    \
            STORE(weight, at, x, (uint32_t)((noise >> 16) + 0x8000));                                    \
        }                                                                                                \
    }
APPLY(apply_f32_f32, load_f32, load_f32, store_f32)
APPLY(apply_bf16_f32, load_bf16, load_f32, store_f32)
APPLY(apply_f32_stochastic, load_f32, load_bf16, store_stochastic)
APPLY(apply_bf16_stochastic, load_bf16, load_bf16, store_stochastic)
APPLY(apply_f32_nearest, load_f32, load_bf16, store_nearest)
APPLY(apply_bf16_nearest, load_bf16, load_bf16, store_nearest)

/* squares: m n floats of scratch where they are kept from one iteration to the next, else ROWS n.
   vectors: m + 4 n floats of scratch. hashes: for stochastic rounding by key, m + n integers of scratch, else NULL.
   Returns LEFT_ALONE, with W unchanged, where the row sums of scale^2 G^2 are not inside (least, most), or where a
   factor of G would leave float32. */
int sinkgd_step(const void *grad, int grad_is_bf16, void *weight, int weight_is_bf16, float *squares,
                int squares_are_kept, float *vectors, int32_t *hashes, int32_t key, int64_t m,
                int64_t n, int64_t num_iterations, float scale, float step_size, float decay, float smallest_row,
                float smallest_column, float least, float most) {
    float *u = vectors, *v = u + m, *columns = v + n, *block = columns + n, *c = block + n;
    for (int64_t iteration = 0; iteration < num_iterations; iteration++) {
        memset(columns, 0, 2 * n * sizeof(float)); /* and block */
        for (int64_t i = 0; i < m; i += ROWS) {
            const int64_t rows = m - i < ROWS ? m - i : ROWS;
            float *part = squares_are_kept ? squares + i * n : squares;
            if (iteration == 0 || !squares_are_kept) {
                (grad_is_bf16 ? square_bf16 : square_f32)(grad, i, rows, n, scale, part, u + i);
            }
            for (int64_t k = i; iteration == 0 && k < i + rows; k++) {
                if (!(least < u[k] && u[k] < most)) return LEFT_ALONE;
            }
            if (iteration > 0) weigh_rows(part, rows, n, v, u + i);
            for (int64_t k = i; k < i + rows; k++) u[k] = u[k] <= smallest_row ? 0 : (float)n / u[k];
            add_columns(part, rows, n, u + i, block);
            if ((i + ROWS) % BLOCK == 0) fold(block, columns, n);
        }
        fold(block, columns, n);
        for (int64_t j = 0; j < n; j++) {
            const float sum = columns[j] > smallest_column ? columns[j] : smallest_column;
            v[j] = (float)m / sum;
            c[j] = columns[j] <= smallest_column ? 0 : sqrtf(v[j]);
        }
    }
    float tallest = 0, widest = 1;
    for (int64_t i = 0; i < m; i++) tallest = fmaxf(tallest, sqrtf(u[i]) * scale);
    for (int64_t j = 0; j < n; j++) widest = fmaxf(widest, c[j]);
    if (!(tallest * widest < FLT_MAX)) return LEFT_ALONE;
    if (hashes) hash_indices(hashes, m, n, key);
    for (int64_t i = 0; i < m; i++) {
        const float r = sqrtf(u[i]) * scale;
        const uint32_t row_hash = hashes ? (uint32_t)hashes[i] : 0;
        const int32_t *column_hash = hashes ? hashes + m : 0;
        if (!weight_is_bf16) {
            (grad_is_bf16 ? apply_bf16_f32 : apply_f32_f32)(grad, weight, i, n, r, c, step_size, decay, 0, 0);
        } else if (hashes) {
            (grad_is_bf16 ? apply_bf16_stochastic : apply_f32_stochastic)(grad, weight, i, n, r, c, step_size, decay,
                                                                          row_hash, column_hash);
        } else {
            (grad_is_bf16 ? apply_bf16_nearest : apply_f32_nearest)(grad, weight, i, n, r, c, step_size, decay, 0, 0);
        }
    }
    return DONE;
}
