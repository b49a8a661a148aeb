/* gram and combine: K gradients, each given as the same list of entries (tensors). */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Tensor k of entry e is data[e * count + k]; the entries lie side by side at starts[e] .. starts[e + 1] elements. */
typedef struct {
    int64_t entries, count;
    const void *const *data;
    const uint8_t *types;
    const int64_t *starts;
} gradients;

static int64_t entry_at(const gradients *s, int64_t position) {
    int64_t low = 0, high = s->entries;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (s->starts[middle] <= position)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* ---- gram ---- */

/* TILE x TILE inner products at a time: 9 of 16 registers hold sums, and the operands are loaded once. */
#define TILE 3

enum { NOT_A_PAIR = -1 };

typedef struct {
    gradients s; /* the `count` gradients, and behind them the second moment if there is one */
    int64_t first, count, pairs; /* the chunk of unit 0; the gradients; the inner products of one chunk and matrix */
    int pair; /* the type of two gradients that are all float32 or all bfloat16, without a second moment */
    int matrices; /* 2 with a second moment: the plain one, and the one that it weighs */
    float scale, eps;
    double *partials; /* [units, matrices, pairs] */
} gram_task;

/* `n` elements of gradient k from `position` on, of type `wanted` (their own, or F32), padded by zeros. */
static const void *load(const gradients *s, int64_t k, int64_t position, int64_t n, int wanted, void *buffer) {
    int64_t entry = entry_at(s, position), offset = position - s->starts[entry], bytes = wanted == F32 ? 4 : 2;
    for (int64_t done = 0, size; done < n; done += size, entry++, offset = 0) {
        size = MIN(n - done, s->starts[entry + 1] - s->starts[entry] - offset);
        int type = s->types[entry * s->count + k];
        const void *data = s->data[entry * s->count + k];
        char *target = (char *)buffer + done * bytes;
        const void *piece = (const char *)data + offset * bytes;
        if (type != wanted) piece = as_float(type, data, offset, size, (float *)(void *)target);
        if (size == n && n % LANES == 0) return piece;
        if (piece != target) memcpy(target, piece, (size_t)(size * bytes));
    }
    memset((char *)buffer + n * bytes, 0, (size_t)((PADDED(n) - n) * bytes));
    return buffer;
}

/* Add to sums [TILE, TILE] the inner products of rows x[0..2] with rows y[0..2], each of n values, n a multiple of 8:
 * every lane sums n / 8 products in float32, and these sums are added in float64. Meanwhile `soon` and `later` are
 * fetched: rows of the next panel, which else would be waited for while no sum is formed. */
CLONES static void tile(const float *const *x, const float *const *y, int64_t n, const char *soon, const char *later,
                        double *sums) {
    const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *y0 = y[0], *y1 = y[1], *y2 = y[2];
    v8f a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0}, j = {0};
    for (int64_t i = 0; i < n; i += 8) {
        v8f p = *(const v8f *)(x0 + i), q = *(const v8f *)(x1 + i), r = *(const v8f *)(x2 + i);
        __builtin_prefetch(soon + 4 * i, 0, 2);
        __builtin_prefetch(later + 4 * i, 0, 2);
        v8f u = *(const v8f *)(y0 + i);
        a += p * u, d += q * u, g += r * u;
        u = *(const v8f *)(y1 + i);
        b += p * u, e += q * u, h += r * u;
        u = *(const v8f *)(y2 + i);
        c += p * u, f += q * u, j += r * u;
    }
    double results[TILE * TILE] = {sum8(a), sum8(b), sum8(c), sum8(d), sum8(e), sum8(f), sum8(g), sum8(h), sum8(j)};
    for (int i = 0; i < TILE * TILE; i++) sums[i] += results[i];
}

/* The same for two rows alone, in float64 throughout: with two float32 gradients, memory is the limit anyway. */
CLONES static void pair_f32(const float *x, const float *y, int64_t n, double *sums) {
    v4d a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0};
    for (int64_t i = 0; i < n; i += 8) {
        v8f p = *(const v8f *)(x + i), q = *(const v8f *)(y + i);
        v4d p0 = low(p), p1 = high(p), q0 = low(q), q1 = high(q);
        a += p0 * p0, b += p0 * q0, c += q0 * q0;
        d += p1 * p1, e += p1 * q1, f += q1 * q1;
    }
    sums[0] += sum4(a + d), sums[1] += sum4(b + e), sums[TILE + 1] += sum4(c + f);
}

/* Of two bfloat16 rows, in float32 as in `tile`. */
CLONES static void pair_bf16(const uint16_t *x, const uint16_t *y, int64_t n, double *sums) {
    v8f a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0};
    for (int64_t i = 0; i < n; i += 16) {
        v8u u = *(const v8u *)(x + i), w = *(const v8u *)(y + i);
        v8f p0 = first_of(u), p1 = second_of(u), q0 = first_of(w), q1 = second_of(w);
        a += p0 * p0, b += p0 * q0, c += q0 * q0;
        d += p1 * p1, e += p1 * q1, f += q1 * q1;
    }
    sums[0] += sum8(a) + sum8(d), sums[1] += sum8(b) + sum8(e), sums[TILE + 1] += sum8(c) + sum8(f);
}

/* The same as `pair_f32` for two rows of any type, widened to float32, and for their products weighted by p. */
CLONES static void weighted_pair(const float *x, const float *y, const float *p, int64_t n, double *sums,
                                 double *weighted) {
    v4d a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0};
    for (int64_t i = 0; i < n; i += 8) {
        v8f u = *(const v8f *)(x + i), v = *(const v8f *)(y + i), w = *(const v8f *)(p + i);
        v4d u0 = low(u), u1 = high(u), v0 = low(v), v1 = high(v);
        v4d wu0 = low(w) * u0, wu1 = high(w) * u1, wv0 = low(w) * v0, wv1 = high(w) * v1;
        a += u0 * u0, b += u0 * v0, c += v0 * v0;
        d += wu0 * u0, e += wu0 * v0, f += wv0 * v0;
        a += u1 * u1, b += u1 * v1, c += v1 * v1;
        d += wu1 * u1, e += wu1 * v1, f += wv1 * v1;
    }
    sums[0] += sum4(a), sums[1] += sum4(b), sums[TILE + 1] += sum4(c);
    weighted[0] += sum4(d), weighted[1] += sum4(e), weighted[TILE + 1] += sum4(f);
}

/* What AdamW multiplies a gradient by: p = 1 / (scale sqrt(v) + eps). */
CLONES static void precondition(const float *v, float scale, float eps, int64_t n, float *p) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) p[i] = 1.0f / (scale * sqrtf(v[i]) + eps);
}

CLONES static void multiply(const float *x, const float *p, int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * p[i];
}

static int64_t blocks_of(int64_t count) { return (count + TILE - 1) / TILE; }

static int64_t rows_of(int64_t count) { return blocks_of(count) * TILE; }

/* Every product of one row with another, for the blocks on and above the diagonal. */
static void all_tiles(const float *const *x, const float *const *y, int64_t count, int64_t n, double *sums) {
    int64_t rows = rows_of(count), blocks = blocks_of(count), tiles = blocks * (blocks + 1) / 2, done = 0;
    for (int64_t a = 0; a < rows; a += TILE)
        for (int64_t b = a; b < rows; b += TILE, done++) {
            const char *soon = (const char *)(y[done * count / tiles] + n);
            const char *later = (const char *)(y[((done + 1) * count - 1) / tiles] + n);
            tile(x + a, y + b, n, soon, later, sums + done * TILE * TILE);
        }
}

/* Bytes: panels of the rows, and with a second moment those of the weighted rows, of it and of p; then pointers to the
 * rows. */
static int64_t gram_scratch(int64_t count, int matrices) {
    int64_t rows = rows_of(count), panels = matrices == 1 ? rows : 2 * rows + 2;
    return panels * PANEL * (int64_t)sizeof(float) + 2 * rows * (int64_t)sizeof(float *);
}

static void gram_chunk(void *task, int64_t unit, void *scratch) {
    const gram_task *t = task;
    const gradients *s = &t->s;
    int64_t from = (t->first + unit) * CHUNK, to = MIN(from + CHUNK, s->starts[s->entries]);
    int64_t count = t->count, rows = rows_of(count);
    double *sums = t->partials + unit * t->matrices * t->pairs, *weighted = sums + t->pairs;
    float *buffer = scratch, *weighted_buffer = buffer + rows * PANEL;
    float *moment = buffer + 2 * rows * PANEL, *p = moment + PANEL;
    const float **row = (const float **)(t->matrices == 1 ? weighted_buffer : p + PANEL), **weighted_row = row + rows;
    memset(sums, 0, (size_t)(t->matrices * t->pairs) * sizeof(double));
    memset(buffer + count * PANEL, 0, (size_t)((rows - count) * PANEL) * sizeof(float));
    for (int64_t k = count; k < rows; k++) row[k] = weighted_row[k] = buffer + k * PANEL;
    for (int64_t at = from; at < to; at += PANEL) {
        int64_t n = MIN(PANEL, to - at), whole = PADDED(n);
        if (t->pair != NOT_A_PAIR) {
            const void *x = load(s, 0, at, n, t->pair, buffer), *y = load(s, 1, at, n, t->pair, buffer + PANEL);
            if (t->pair == F32)
                pair_f32(x, y, whole, sums);
            else
                pair_bf16(x, y, whole, sums);
            continue;
        }
        for (int64_t k = 0; k < count; k++) row[k] = load(s, k, at, n, F32, buffer + k * PANEL);
        if (t->matrices == 1) {
            all_tiles(row, row, count, whole, sums);
            continue;
        }
        precondition(load(s, count, at, n, F32, moment), t->scale, t->eps, whole, p);
        if (count == 2) {
            weighted_pair(row[0], row[1], p, whole, sums, weighted);
            continue;
        }
        for (int64_t k = 0; k < count; k++) {
            multiply(row[k], p, whole, weighted_buffer + k * PANEL);
            weighted_row[k] = weighted_buffer + k * PANEL;
        }
        all_tiles(row, row, count, whole, sums);
        all_tiles(weighted_row, row, count, whole, weighted);
    }
}

/* Where <g_i, g_j>, i <= j, stands among the sums of a chunk. */
static int64_t place(int64_t count, int64_t i, int64_t j) {
    int64_t blocks = blocks_of(count), a = i / TILE, b = j / TILE;
    return ((a * blocks - a * (a - 1) / 2 + b - a) * TILE + i % TILE) * TILE + j % TILE;
}

/* out [matrices, count, count] float64. Returns 0, or -1 where memory is lacking. */
static int run_gram(gram_task *task, int threads, double *out) {
    int64_t count = task->count, chunks = (task->s.starts[task->s.entries] + CHUNK - 1) / CHUNK;
    int64_t blocks = blocks_of(count), pairs = blocks * (blocks + 1) / 2 * TILE * TILE, sums = task->matrices * pairs;
    /* A megabyte of partial sums at a time, added in the order of the chunks: the bits do not depend on the size. */
    int64_t wave = MIN(chunks, (1 << 20) / (sums * (int64_t)sizeof(double)) + 1);
    double *total = calloc((size_t)sums, sizeof(double));
    task->pairs = pairs;
    task->partials = malloc((size_t)(wave * sums + 1) * sizeof(double));
    int failed = total == NULL || task->partials == NULL;
    for (; !failed && task->first < chunks; task->first += wave) {
        int64_t units = MIN(wave, chunks - task->first);
        failed = parallel(threads, units, gram_chunk, task, gram_scratch(count, task->matrices)) != 0;
        for (int64_t unit = 0; unit < units; unit++)
            for (int64_t i = 0; i < sums; i++) total[i] += task->partials[unit * sums + i];
    }
    for (int m = 0; !failed && m < task->matrices; m++)
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = i; j < count; j++) {
                double *matrix = out + m * count * count;
                matrix[i * count + j] = matrix[j * count + i] = total[m * pairs + place(count, i, j)];
            }
    free(total);
    free(task->partials);
    return failed ? -1 : 0;
}

/* out [count, count] float64: the inner products of all pairs. Returns 0, or -1 where memory is lacking. */
EXPORT int unlearn_gram(int64_t entries, int64_t count, const void *const *data, const uint8_t *types,
                        const int64_t *starts, int threads, double *out) {
    gram_task task = {.s = {entries, count, data, types, starts}, .count = count, .pair = NOT_A_PAIR, .matrices = 1};
    if (count == 2 && entries > 0 && types[0] != F16) task.pair = types[0];
    for (int64_t i = 0; i < entries * count; i++)
        if (types[i] != types[0]) task.pair = NOT_A_PAIR;
    return run_gram(&task, threads, out);
}

/* out [2, count, count] float64: the inner products of all pairs, plain and weighted by 1 / (scale sqrt(v) + eps).
 * v is the last tensor of each entry, behind its gradients. 0, or -1 as above. */
EXPORT int unlearn_preconditioned_gram(int64_t entries, int64_t count, const void *const *data, const uint8_t *types,
                                       const int64_t *starts, float scale, float eps, int threads, double *out) {
    gram_task task = {.s = {entries, count + 1, data, types, starts}, .count = count, .pair = NOT_A_PAIR,
                      .matrices = 2, .scale = scale, .eps = eps};
    return run_gram(&task, threads, out);
}

/* ---- combine ---- */

/* Longer than PANEL: with many gradients each stream should be read for a while before the next. */
#define STRETCH 4096

typedef struct {
    gradients s;
    void *const *out; /* [entries] */
    const uint8_t *out_types;
    const float *coefficients;
} combine_task;

CLONES static void scale(const float *a, float x, int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x * a[i];
}

CLONES static void axpby(const float *a, float x, const float *b, float y, int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x * a[i] + y * b[i];
}

CLONES static void add(const float *a, float x, int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] += x * a[i];
}

CLONES static void add_pair(const float *a, float x, const float *b, float y, int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] += x * a[i] + y * b[i];
}

/* bfloat16 to bfloat16 without leaving the registers: panels would cost as much as the memory. */
CLONES static void axpby_bf16(const uint16_t *a, float x, const uint16_t *b, float y, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        v8u u = *(const v8u *)(a + i), w = *(const v8u *)(b + i);
        *(v8u *)(out + i) = both_of(x * first_of(u) + y * first_of(w), x * second_of(u) + y * second_of(w));
    }
    for (; i < n; i++) {
        word p = {.bits = (uint32_t)a[i] << 16}, q = {.bits = (uint32_t)b[i] << 16};
        word sum = {.value = x * p.value + y * q.value};
        out[i] = bf16_of(sum.bits);
    }
}

static void combine_chunk(void *task, int64_t unit, void *scratch) {
    const combine_task *t = task;
    const gradients *s = &t->s;
    const float *c = t->coefficients;
    float *left = scratch, *right = left + STRETCH, *sum = right + STRETCH;
    int64_t at = unit * CHUNK, end = MIN(at + CHUNK, s->starts[s->entries]);
    for (int64_t entry = entry_at(s, at); at < end; entry++) {
        int64_t stop = MIN(end, s->starts[entry + 1]);
        const void *const *data = s->data + entry * s->count;
        const uint8_t *types = s->types + entry * s->count;
        for (int64_t n; at < stop; at += n) {
            int64_t offset = at - s->starts[entry];
            n = MIN(STRETCH, stop - at);
            int type = t->out_types[entry];
            if (s->count == 2 && type == BF16 && types[0] == BF16 && types[1] == BF16) {
                axpby_bf16((const uint16_t *)data[0] + offset, c[0], (const uint16_t *)data[1] + offset, c[1], n,
                           (uint16_t *)t->out[entry] + offset);
                continue;
            }
            /* Two gradients into float32 need no detour. More would be overwritten where the output is one of them. */
            float *out = s->count <= 2 && type == F32 ? (float *)t->out[entry] + offset : sum;
            const float *a = as_float(types[0], data[0], offset, n, left);
            if (s->count == 1)
                scale(a, c[0], n, out);
            else
                axpby(a, c[0], as_float(types[1], data[1], offset, n, right), c[1], n, out);
            int64_t k = 2;
            for (; k + 1 < s->count; k += 2) {
                a = as_float(types[k], data[k], offset, n, left);
                add_pair(a, c[k], as_float(types[k + 1], data[k + 1], offset, n, right), c[k + 1], n, out);
            }
            if (k < s->count) add(as_float(types[k], data[k], offset, n, left), c[k], n, out);
            narrow(type, out, n, t->out[entry], offset);
        }
    }
}

/* out [entries] = sum over k of coefficients[k] * gradient k; out may be one of the gradients. 0, or -1 as above. */
EXPORT int unlearn_combine(int64_t entries, int64_t count, void *const *out, const uint8_t *out_types,
                           const void *const *data, const uint8_t *types, const int64_t *starts,
                           const float *coefficients, int threads) {
    combine_task task = {{entries, count, data, types, starts}, out, out_types, coefficients};
    int64_t chunks = (starts[entries] + CHUNK - 1) / CHUNK;
    return parallel(threads, chunks, combine_chunk, &task, 3 * STRETCH * (int64_t)sizeof(float));
}
