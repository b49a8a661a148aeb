/* The model input and the weighted loss: B samples of M elements each. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_TERMS = 3 };

/* A sample is cut into blocks of CHUNK elements; a unit is one block of one sample. */
typedef struct {
    int64_t sample, from, to;
} block;

static int64_t blocks_of(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

static block block_at(int64_t unit, int64_t size) {
    int64_t blocks = blocks_of(size), from = unit % blocks * CHUNK;
    return (block){unit / blocks, from, MIN(from + CHUNK, size)};
}

/* ---- noise_and_target ---- */

typedef struct {
    int64_t size;
    const void *data[3]; /* eps, x_f, x_s */
    uint8_t types[3], out_type;
    const float *path, *coefficients; /* [B, 2], [B, 3] */
    void *x_t, *target;               /* target may be NULL */
} noise_task;

CLONES static void mix2(const float *a, float x, const float *b, float y, int64_t n, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x * a[i] + y * b[i];
}

CLONES static void mix3(const float *a, const float *b, const float *c, const float *by, int64_t n, float *out) {
    float x = by[0], y = by[1], z = by[2];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = x * a[i] + y * b[i] + z * c[i];
}

static void noise_block(void *task, int64_t unit, void *scratch) {
    const noise_task *t = task;
    block b = block_at(unit, t->size);
    const float *path = t->path + 2 * b.sample, *coefficients = t->coefficients + 3 * b.sample;
    float *buffer = scratch, *sum = buffer + 3 * PANEL;
    for (int64_t at = b.from, n; at < b.to; at += n) {
        n = MIN(PANEL, b.to - at);
        int64_t offset = b.sample * t->size + at;
        const float *eps = as_float(t->types[0], t->data[0], offset, n, buffer);
        const float *x_f = as_float(t->types[1], t->data[1], offset, n, buffer + PANEL);
        float *out = t->out_type == F32 ? (float *)t->x_t + offset : sum;
        mix2(x_f, path[0], eps, path[1], n, out);
        narrow(t->out_type, out, n, t->x_t, offset);
        if (t->target == NULL) continue;
        const float *x_s = as_float(t->types[2], t->data[2], offset, n, buffer + 2 * PANEL);
        out = t->out_type == F32 ? (float *)t->target + offset : sum;
        mix3(eps, x_f, x_s, coefficients, n, out);
        narrow(t->out_type, out, n, t->target, offset);
    }
}

/* data, types: eps, x_f, x_s, each [batch, size]. path [batch, 2] (a, b), coefficients [batch, 3] (c_eps, c_f, c_s).
 * x_t and target (NULL: not wanted) are [batch, size] of out_type. Returns 0, or -1 where memory is lacking. */
EXPORT int unlearn_noise_and_target(int64_t batch, int64_t size, const void *const *data, const uint8_t *types,
                                    const float *path, const float *coefficients, int out_type, void *x_t, void *target,
                                    int threads) {
    noise_task task = {size,
                       {data[0], data[1], data[2]},
                       {types[0], types[1], types[2]},
                       (uint8_t)out_type,
                       path,
                       coefficients,
                       x_t,
                       target};
    return parallel(threads, batch * blocks_of(size), noise_block, &task, 4 * PANEL * (int64_t)sizeof(float));
}

/* ---- weighted_loss ---- */

typedef struct {
    int64_t size, masked; /* elements of a sample; of its mask, which repeats along the sample */
    int terms, all_bf16; /* and without a mask */
    const void *pred, *data[MOST_TERMS];
    uint8_t type, gradient_type, types[MOST_TERMS];
    const float *coefficients, *mask; /* [B, terms]; [B, masked] or NULL */
    const double *factors;            /* [B]: of the sum of a sample's squares in the loss */
    void *gradient;                   /* [B, size] of gradient_type, or NULL */
    double *partials;                 /* [B, blocks] */
} loss_task;

/* d = pred - sum of c[k] term[k], over n elements, a multiple of 8. Returns sum m d^2 and leaves s m d in `out`.
 * What is masked out counts as 0, NaN too. */
#define DEFINE_LOSS(name, TARGET, MASK)                                                                        \
    CLONES static double name(const float *pred, const float *const *term, const float *c, const float *mask,  \
                              float s, int64_t n, float *out) {                                                \
        v8f even = {0}, odd = {0};                                                                             \
        const float *t0 = term[0], *t1 = term[1], *t2 = term[2];                                               \
        float c0 = c[0], c1 = c[1], c2 = c[2];                                                                 \
        (void)t1, (void)t2, (void)c1, (void)c2, (void)mask;                                                    \
        for (int64_t i = 0; i < n; i += 8) {                                                                   \
            v8f d = *(const v8f *)(pred + i) - (TARGET), m = d;                                                \
            MASK;                                                                                              \
            if (i & 8)                                                                                         \
                odd += m * d;                                                                                  \
            else                                                                                               \
                even += m * d;                                                                                 \
            *(v8f *)(out + i) = s * m;                                                                         \
        }                                                                                                      \
        return sum8(even) + sum8(odd);                                                                         \
    }
#define AT(p) (*(const v8f *)((p) + i))
#define MASKED                                                  \
    v8f keep = AT(mask);                                        \
    d = (v8f)((v8i)d & (keep != 0));                            \
    m = keep * d
#define ONE c0 *AT(t0)
#define TWO c0 *AT(t0) + c1 *AT(t1)
#define THREE c0 *AT(t0) + c1 *AT(t1) + c2 *AT(t2)
DEFINE_LOSS(loss_1, ONE, )
DEFINE_LOSS(loss_2, TWO, )
DEFINE_LOSS(loss_3, THREE, )
DEFINE_LOSS(masked_1, ONE, MASKED)
DEFINE_LOSS(masked_2, TWO, MASKED)
DEFINE_LOSS(masked_3, THREE, MASKED)

typedef double (*loss_kernel)(const float *, const float *const *, const float *, const float *, float, int64_t, float *);
static const loss_kernel LOSSES[2][MOST_TERMS] = {{loss_1, loss_2, loss_3}, {masked_1, masked_2, masked_3}};

/* The same without a mask where all is bfloat16, n a multiple of 16: nothing leaves the registers. `out` may be NULL. */
#define DEFINE_LOSS_BF16(name, TARGET)                                                                           \
    CLONES static double name(const uint16_t *pred, const uint16_t *const *term, const float *c, float s, int64_t n, \
                              uint16_t *out) {                                                                   \
        v8f even = {0}, odd = {0};                                                                               \
        const uint16_t *t0 = term[0], *t1 = term[1], *t2 = term[2];                                              \
        float c0 = c[0], c1 = c[1], c2 = c[2];                                                                   \
        (void)t1, (void)t2, (void)c1, (void)c2;                                                                  \
        for (int64_t i = 0; i < n; i += 16) {                                                                    \
            v8u p = *(const v8u *)(pred + i);                                                                    \
            v8f d = first_of(p) - (TARGET(first_of)), e = second_of(p) - (TARGET(second_of));                    \
            even += d * d, odd += e * e;                                                                         \
            if (out != NULL) *(v8u *)(out + i) = both_of(s * d, s * e);                                          \
        }                                                                                                        \
        return sum8(even) + sum8(odd);                                                                           \
    }
#define WORDS(t) (*(const v8u *)((t) + i))
#define HALF_ONE(half) c0 *half(WORDS(t0))
#define HALF_TWO(half) c0 *half(WORDS(t0)) + c1 *half(WORDS(t1))
#define HALF_THREE(half) c0 *half(WORDS(t0)) + c1 *half(WORDS(t1)) + c2 *half(WORDS(t2))
DEFINE_LOSS_BF16(bf16_1, HALF_ONE)
DEFINE_LOSS_BF16(bf16_2, HALF_TWO)
DEFINE_LOSS_BF16(bf16_3, HALF_THREE)

typedef double (*bf16_kernel)(const uint16_t *, const uint16_t *const *, const float *, float, int64_t, uint16_t *);
static const bf16_kernel BF16_LOSSES[MOST_TERMS] = {bf16_1, bf16_2, bf16_3};

/* As `as_float`, padded by zeros. */
static const float *padded(int type, const void *source, int64_t offset, int64_t n, float *buffer) {
    const float *values = as_float(type, source, offset, n, buffer);
    if (n % LANES == 0) return values;
    if (values != buffer) memcpy(buffer, values, (size_t)n * sizeof(float));
    memset(buffer + n, 0, (size_t)(PADDED(n) - n) * sizeof(float));
    return buffer;
}

/* A NaN with nothing in its lower bits, which `both_of` could carry into the sign. */
static inline float quiet(float value) { return value == value ? value : NAN; }

static void loss_block(void *task, int64_t unit, void *scratch) {
    const loss_task *t = task;
    block b = block_at(unit, t->size);
    float *out = scratch, *buffers = out + PANEL, c[MOST_TERMS] = {0};
    memcpy(c, t->coefficients + b.sample * t->terms, (size_t)t->terms * sizeof(float));
    loss_kernel kernel = LOSSES[t->mask != NULL][t->terms - 1];
    double factor = t->factors[b.sample], sum = 0;
    float slope = quiet((float)(2 * factor));
    for (int k = 0; k < t->terms; k++) c[k] = quiet(c[k]);
    for (int64_t at = b.from, n; at < b.to; at += n) {
        n = MIN(PANEL, b.to - at);
        const float *mask = NULL;
        if (t->mask != NULL) {
            int64_t within = at % t->masked;
            n = MIN(n, t->masked - within);
            mask = padded(F32, t->mask, b.sample * t->masked + within, n, buffers + 4 * PANEL);
        }
        int64_t offset = b.sample * t->size + at, whole = PADDED(n);
        if (t->all_bf16 && whole == n) {
            const uint16_t *half[MOST_TERMS], *all = (const uint16_t *)t->pred + offset;
            for (int k = 0; k < MOST_TERMS; k++) half[k] = k < t->terms ? (const uint16_t *)t->data[k] + offset : all;
            uint16_t *gradient = t->gradient == NULL ? NULL : (uint16_t *)t->gradient + offset;
            sum += BF16_LOSSES[t->terms - 1](all, half, c, slope, n, gradient);
            continue;
        }
        const float *pred = padded(t->type, t->pred, offset, n, buffers), *term[MOST_TERMS] = {pred, pred, pred};
        for (int k = 0; k < t->terms; k++)
            term[k] = padded(t->types[k], t->data[k], offset, n, buffers + (k + 1) * PANEL);
        int direct = t->gradient != NULL && t->gradient_type == F32 && whole == n;
        float *gradient = direct ? (float *)t->gradient + offset : out;
        sum += kernel(pred, term, c, mask, slope, whole, gradient);
        if (t->gradient != NULL) narrow(t->gradient_type, gradient, n, t->gradient, offset);
    }
    /* A weight of 0 does not hide a NaN; a sample without a single masked element has no sum to hide. */
    t->partials[unit] = factor * sum;
}

/* pred [batch, size]; terms of them, 1 to 3: data, types, coefficients [batch, terms]; weight [batch]; mask [batch, masked] or
 * NULL, size a multiple of masked. Writes loss = mean of weight * (masked) mean of (pred - target)^2, and its gradient
 * in pred where `gradient` is given. Returns 0, or -1 where memory is lacking. */
EXPORT int unlearn_weighted_loss(int64_t batch, int64_t size, int type, const void *pred, int terms,
                                 const void *const *data, const uint8_t *types, const float *coefficients,
                                 const float *weight, const float *mask, int64_t masked, int threads, double *loss,
                                 int gradient_type, void *gradient) {
    int64_t blocks = blocks_of(size), units = batch * blocks;
    loss_task task = {.size = size, .masked = masked, .terms = terms, .pred = pred, .type = (uint8_t)type,
                      .coefficients = coefficients, .mask = mask, .gradient_type = (uint8_t)gradient_type, .gradient = gradient};
    double *factors = malloc((size_t)batch * sizeof(double));
    task.factors = factors;
    task.partials = malloc((size_t)units * sizeof(double));
    int failed = factors == NULL || task.partials == NULL;
    if (!failed) {
        task.all_bf16 = mask == NULL && type == BF16 && gradient_type == BF16;
        for (int k = 0; k < terms; k++) {
            task.data[k] = data[k], task.types[k] = types[k];
            task.all_bf16 &= types[k] == BF16;
        }
        for (int64_t i = 0; i < batch; i++) {
            double elements = 0;
            for (int64_t j = 0; mask != NULL && j < masked; j++) elements += mask[i * masked + j];
            elements = mask == NULL ? (double)size : elements * (double)(size / masked);
            factors[i] = elements > 0 ? weight[i] / (elements * (double)batch) : 0;
        }
        failed = parallel(threads, units, loss_block, &task, (2 + 4) * PANEL * (int64_t)sizeof(float)) != 0;
    }
    *loss = 0;
    for (int64_t unit = 0; !failed && unit < units; unit++) *loss += task.partials[unit];
    free(factors);
    free(task.partials);
    return failed ? -1 : 0;
}
