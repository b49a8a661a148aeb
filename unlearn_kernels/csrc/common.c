#include "kernels.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

CLONES static void widen_bf16(const uint16_t *source, int64_t n, float *target) {
    uint32_t *bits = (uint32_t *)(void *)target;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)source[i] << 16;
}

CLONES static void widen_f16(const uint16_t *source, int64_t n, float *target) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = (uint32_t)(source[i] & 0x7fff) << 13;
        word w = {.bits = magnitude};
        w.value *= 0x1p112f; /* the exponents' biases differ by 112; right for subnormals too */
        w.bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0; /* infinity and NaN */
        w.bits |= (uint32_t)(source[i] & 0x8000) << 16;
        target[i] = w.value;
    }
}

CLONES static void narrow_bf16(const float *source, int64_t n, uint16_t *target) {
    const uint32_t *bits = (const uint32_t *)(const void *)source;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        int32_t nan = (int32_t)(bits[i] & 0x7fffffff) > 0x7f800000;
        target[i] = nan ? (uint16_t)((bits[i] >> 16) | 0x40) : bf16_of(bits[i]);
    }
}

CLONES static void narrow_f16(const float *source, int64_t n, uint16_t *target) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        word w = {.value = source[i]};
        uint32_t sign = (w.bits >> 16) & 0x8000, u = w.bits & 0x7fffffff;
        word small = {.bits = u};
        small.value += 0.5f; /* aligns the last bit with the smallest subnormal, rounding to even */
        uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1)) >> 13;
        uint32_t large = u > 0x7f800000u ? 0x7e00 : 0x7c00;
        uint32_t result = u < 0x38800000u ? small.bits - 0x3f000000u : normal;
        target[i] = (uint16_t)(sign | (u >= 0x47800000u ? large : result));
    }
}

const float *as_float(int type, const void *source, int64_t offset, int64_t n, float *buffer) {
    if (type == F32) return (const float *)source + offset;
    const uint16_t *half = (const uint16_t *)source + offset;
    if (type == BF16)
        widen_bf16(half, n, buffer);
    else
        widen_f16(half, n, buffer);
    return buffer;
}

void narrow(int type, const float *source, int64_t n, void *target, int64_t offset) {
    if (type == F32) {
        float *out = (float *)target + offset;
        if (out != source) memcpy(out, source, (size_t)n * sizeof(float));
    } else if (type == BF16) {
        narrow_bf16(source, n, (uint16_t *)target + offset);
    } else {
        narrow_f16(source, n, (uint16_t *)target + offset);
    }
}

typedef struct {
    body run;
    void *task;
    int64_t units, scratch;
    atomic_int_fast64_t next;
} team;

static void *work(void *argument) {
    team *t = argument;
    void *scratch = aligned_alloc(64, (size_t)((t->scratch + 63) / 64 * 64));
    if (scratch == NULL) return NULL; /* the others do its part */
    for (int64_t unit; (unit = atomic_fetch_add(&t->next, 1)) < t->units;) t->run(t->task, unit, scratch);
    free(scratch);
    return NULL;
}

/* Threads of its own for each call, some 20 us apiece: an OpenMP runtime would be the process's second beside torch's,
 * would have to be shipped, and does not survive a fork. */
int parallel(int threads, int64_t units, body run, void *task, int64_t scratch) {
    team t = {.run = run, .task = task, .units = units, .scratch = scratch};
    enum { MOST = 256 };
    pthread_t others[MOST];
    int wanted = (int)MIN(MIN((int64_t)threads, units), MOST) - 1, started = 0;
    /* Where no more threads are to be had, fewer do the same work. */
    while (started < wanted && pthread_create(&others[started], NULL, work, &t) == 0) started++;
    work(&t);
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    return atomic_load(&t.next) < units ? -1 : 0;
}

/* Counts up with every change of a signature: native.py refuses a library that was built from other sources. */
EXPORT int unlearn_abi(void) { return 3; }
