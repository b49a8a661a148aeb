/* What the kernels share: element types, clones per instruction set, and threads.
 *
 * Arithmetic is float32 or float64 in registers; bfloat16 and float16 are widened and narrowed by integer bits, so gcc
 * and clang build this for any instruction set. Vectors have a fixed number of lanes: the order of every
 * sum is the same on every machine.
 */
#ifndef UNLEARN_KERNELS_H
#define UNLEARN_KERNELS_H

#include <stdint.h>

/* The codes that native.py sends. */
enum { F32 = 0, BF16 = 1, F16 = 2 };

/* Work is cut into chunks of this many elements, whatever the number of threads: the unit of every partial sum. */
#define CHUNK 65536
/* Elements that are widened at a time: small enough for the first cache, long enough for the prefetcher. */
#define PANEL 512

/* By name of the level from gcc 12 on; the choice at load time needs glibc. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* Lanes that are worked on together; panels are padded by zeros to a multiple of it. */
#define LANES 16
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

typedef float v8f __attribute__((vector_size(32), aligned(4), may_alias));
typedef double v4d __attribute__((vector_size(32), aligned(8), may_alias));
typedef uint32_t v8u __attribute__((vector_size(32), aligned(2), may_alias));
typedef int32_t v8i __attribute__((vector_size(32), aligned(2), may_alias));

/* Lanes added up in float64, in one order. */
static inline double sum4(v4d v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline v4d low(v8f v) { return (v4d){v[0], v[1], v[2], v[3]}; }
static inline v4d high(v8f v) { return (v4d){v[4], v[5], v[6], v[7]}; }
static inline double sum8(v8f v) { return sum4(low(v) + high(v)); }

typedef union {
    float value;
    uint32_t bits;
} word;

/* The bits of a float32 rounded to nearest even. A NaN stays one as long as its lower 16 bits are 0. */
static inline uint16_t bf16_of(uint32_t bits) { return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); }

/* Eight words of two bfloat16 each. Shifted up a word is its first element, masked its second: what treats all elements
 * alike can work on the two halves without unpacking them. */
static inline v8f first_of(v8u words) { return (v8f)(words << 16); }
static inline v8f second_of(v8u words) { return (v8f)(words & 0xffff0000u); }
/* The way back, rounding to nearest even: for values whose NaN have nothing in their lower bits, as those of bfloat16. */
static inline v8u both_of(v8f first, v8f second) {
    v8u a = (v8u)first, b = (v8u)second;
    a += 0x7fff + ((a >> 16) & 1), b += 0x7fff + ((b >> 16) & 1);
    return (a >> 16) | (b & 0xffff0000u);
}

/* n elements of `type` at `source` + `offset`, as float32: the place itself where they are, else widened into buffer. */
const float *as_float(int type, const void *source, int64_t offset, int64_t n, float *buffer);
/* Round n float32 to nearest even into elements of `type`. */
void narrow(int type, const float *source, int64_t n, void *target, int64_t offset);

typedef void (*body)(void *task, int64_t unit, void *scratch);
/* Run body for units 0..units-1 on up to `threads` threads, each with `scratch` bytes of its own. 0, or -1: no memory. */
int parallel(int threads, int64_t units, body run, void *task, int64_t scratch);

#endif
