// Products of a few bfloat16 rows with a weight that is read from memory anew each time, as a decode step of a large model
// does. oneDNN first waits for the weight and then multiplies; here the weight streams in, asked for ahead, while what
// has come is multiplied; with more rows the two are level. Needs AVX512-BF16, and is left out where there is AMX, which
// oneDNN uses; `can_multiply` says whether it was compiled.

#include "numbers.h"

#define OUTPUTS 16  // of a block of the weight
#define AHEAD 4096  // bytes of the weight to ask for ahead: some 300 ns of products

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>

int can_multiply(void) { return 1; }

// laid [outputs / 16, inputs / 2, 16, 2] = weight [outputs, inputs], 0 for outputs that do not exist; inputs are even.
void lay_out(const uint16_t *weight, uint16_t *laid, int64_t outputs, int64_t inputs) {
    int64_t blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < inputs; i += 2) {
            uint32_t pairs[OUTPUTS] = {0};
            for (int64_t o = 0; o < OUTPUTS && block * OUTPUTS + o < outputs; o++)
                memcpy(&pairs[o], weight + (block * OUTPUTS + o) * inputs + i, sizeof pairs[o]);
            memcpy(laid + (block * inputs + i) * OUTPUTS, pairs, sizeof pairs);
        }
}

// found [count, 16 outputs from `first` on] = rows and one block of the weight. `pairs` [inputs / 2, 16] are two numbers of
// each of 16 rows side by side; `count` is a constant where this is called.
INLINED void one_block(const int32_t *pairs, const uint16_t *block, const float *bias, const uint16_t *plus,
                       uint16_t *found, int64_t first, int64_t outputs, int64_t inputs, int rows, int count) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++) sums[r] = bias == NULL ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + first);
    for (int64_t i = 0; i < inputs / 2; i++) {
        _mm_prefetch((const char *)(block + i * OUTPUTS * 2) + AHEAD, _MM_HINT_T0);
        __m512bh weights = (__m512bh)_mm512_loadu_si512(block + i * OUTPUTS * 2);
#pragma GCC unroll 16
        for (int r = 0; r < count; r++)
            sums[r] = _mm512_dpbf16_ps(sums[r], weights, (__m512bh)_mm512_set1_epi32(pairs[i * 16 + r]));
    }
    __mmask16 here = outputs - first >= OUTPUTS ? 0xffff : (__mmask16)((1 << (outputs - first)) - 1);
    for (int r = 0; r < rows; r++) {
        __m512 sum = sums[r];
        if (plus != NULL) {
            __m256i more = _mm256_maskz_loadu_epi16(here, plus + r * outputs + first);
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(more), 16)));
        }
        _mm256_mask_storeu_epi16(found + r * outputs + first, here, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

// `multiply_rows` for as many rows as `pairs` has room for.
static void multiply_tiles(const uint16_t *given, const uint16_t *laid, const float *bias, const uint16_t *plus,
                           uint16_t *found, int64_t rows, int64_t outputs, int64_t inputs, int32_t *pairs) {
    int64_t tiles = (rows + 15) / 16, blocks = (outputs + OUTPUTS - 1) / OUTPUTS, size = inputs / 2 * 16;
#pragma omp parallel
    {
#pragma omp for
        for (int64_t i = 0; i < inputs / 2; i++)
            for (int64_t r = 0; r < tiles * 16; r++) {
                int32_t pair = 0;
                if (r < rows) memcpy(&pair, given + r * inputs + 2 * i, sizeof pair);
                pairs[r / 16 * size + i * 16 + r % 16] = pair;
            }
#pragma omp for
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t tile = 0; tile < tiles; tile++) {
                int here = rows - tile * 16 < 16 ? (int)(rows - tile * 16) : 16;
                const uint16_t *block = laid + b * inputs * OUTPUTS;
                const uint16_t *more = plus == NULL ? NULL : plus + tile * 16 * outputs;
                uint16_t *to = found + tile * 16 * outputs;
                const int32_t *of = pairs + tile * size;
                if (here <= 4) one_block(of, block, bias, more, to, b * OUTPUTS, outputs, inputs, here, 4);
                else if (here <= 8) one_block(of, block, bias, more, to, b * OUTPUTS, outputs, inputs, here, 8);
                else if (here <= 12) one_block(of, block, bias, more, to, b * OUTPUTS, outputs, inputs, here, 12);
                else one_block(of, block, bias, more, to, b * OUTPUTS, outputs, inputs, here, 16);
            }
    }
}

// found [rows, outputs] = inputs of rows [rows, inputs] times the weight that was laid out, plus bias [outputs, filled up to
// a whole block] unless NULL, plus `plus` [rows, outputs] unless NULL. Sums are float32, rounded once. `pairs` holds
// `together` rows, a multiple of 16, in the layout of `one_block`.
void multiply_rows(const uint16_t *given, const uint16_t *laid, const float *bias, const uint16_t *plus, uint16_t *found,
                   int32_t *pairs, int64_t together, int64_t rows, int64_t outputs, int64_t inputs) {
    for (int64_t r = 0; r < rows; r += together) {
        int64_t here = rows - r < together ? rows - r : together;
        multiply_tiles(given + r * inputs, laid, bias, plus == NULL ? NULL : plus + r * outputs, found + r * outputs,
                       here, outputs, inputs, pairs);
    }
}
#else
int can_multiply(void) { return 0; }
void lay_out(const uint16_t *weight, uint16_t *laid, int64_t outputs, int64_t inputs) {
    (void)weight, (void)laid, (void)outputs, (void)inputs;
}
void multiply_rows(const uint16_t *given, const uint16_t *laid, const float *bias, const uint16_t *plus, uint16_t *found,
                   int32_t *pairs, int64_t together, int64_t rows, int64_t outputs, int64_t inputs) {
    (void)given, (void)laid, (void)bias, (void)plus, (void)found, (void)pairs, (void)together;
    (void)rows, (void)outputs, (void)inputs;
}
#endif
