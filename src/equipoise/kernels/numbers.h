// Numbers in memory and in registers, and what the files of kernels compute with them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };

#define INLINED static inline __attribute__((always_inline))
#define ALONE 16384  // numbers below which waking other threads takes longer than the work

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// To the nearest, ties to even, as torch rounds; what is not a number stays none.
static inline uint16_t narrowed(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)nearest;
}

static inline float rounded(float wide, int type) { return type == BFLOAT16 ? widened(narrowed(wide)) : wide; }

// One number of an array; the type is a constant where these are called, so that nothing is asked per number.
INLINED float at(const void *from, int64_t i, int type) {
    return type == FLOAT32 ? ((const float *)from)[i] : widened(((const uint16_t *)from)[i]);
}

INLINED void put(void *to, int64_t i, float x, int type) {
    if (type == FLOAT32)
        ((float *)to)[i] = x;
    else
        ((uint16_t *)to)[i] = narrowed(x);
}

// The array from its number `i` on.
INLINED const void *moved(const void *from, int64_t i, int type) {
    return (const char *)from + i * (type == FLOAT32 ? 4 : 2);
}

INLINED void load(float *to, const void *from, int64_t start, int64_t count, int type) {
    if (type == FLOAT32) {
        memcpy(to, (const float *)from + start, count * sizeof(float));
        return;
    }
    const uint16_t *halves = (const uint16_t *)from + start;
    for (int64_t i = 0; i < count; i++) to[i] = widened(halves[i]);
}

INLINED void store(void *to, int64_t start, const float *from, int64_t count, int type) {
    if (type == FLOAT32) {
        memcpy((float *)to + start, from, count * sizeof(float));
        return;
    }
    uint16_t *halves = (uint16_t *)to + start;
    for (int64_t i = 0; i < count; i++) halves[i] = narrowed(from[i]);
}

// e^x to about two units in the last place: 2^n e^r with |r| <= ln 2 / 2; 0 below e^-87, infinite above e^88.
static inline float exponential(float x) {
    float bounded = x > 88.0f ? 88.0f : x < -88.0f ? -88.0f : x;
    float n = rintf(bounded * 1.44269504088896341f);
    float r = fmaf(n, -0.693145751953125f, bounded);
    r = fmaf(n, -1.42860682030941723e-6f, r);
    float sum = 1.0f / 5040.0f;
    sum = fmaf(sum, r, 1.0f / 720.0f);
    sum = fmaf(sum, r, 1.0f / 120.0f);
    sum = fmaf(sum, r, 1.0f / 24.0f);
    sum = fmaf(sum, r, 1.0f / 6.0f);
    sum = fmaf(sum, r, 0.5f);
    sum = fmaf(sum, r, 1.0f);
    sum = fmaf(sum, r, 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : sum * power;
}

// 1 / root mean square, with epsilon under the root.
INLINED float inverse_root(const float *row, int64_t width, float epsilon) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += row[i] * row[i];
    return 1.0f / sqrtf(sum / (float)width + epsilon);
}

// Heads [heads, width] of one position: x cos + swap(x) sin, where swap exchanges the halves and sin has the signs.
INLINED void rotate(const void *from, int from_type, const float *cos, const float *sin, void *to, int to_type,
                    int64_t heads, int64_t width) {
    int64_t half = width / 2;
    for (int64_t place = 0; place < heads * width; place += width) {
#pragma omp simd
        for (int64_t d = 0; d < half; d++) {
            float first = at(from, place + d, from_type), second = at(from, place + d + half, from_type);
            put(to, place + d, first * cos[d] + second * sin[d], to_type);
            put(to, place + d + half, second * cos[d + half] + first * sin[d + half], to_type);
        }
    }
}
