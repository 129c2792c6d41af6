// What a decoder block computes between its matrix products and attention, one call each, for decode steps and for
// training. Every function has a twin of torch's operations in the package that computes the same; tests hold the two
// together.
//
// Numbers are float32 or bfloat16 in memory, as a type says, and float32 in registers; they are rounded where torch
// rounds them, but rotations once only. A row is computed in one order whatever the threads and the rows beside it, and
// sums over rows go by blocks of a fixed size, so results depend on neither. No function allocates what it returns, and
// none looks beyond the sizes that it is given.

#include "numbers.h"

#define CHUNK 64  // rows whose share of a weight's gradient is summed first

// One row of `residual_norm`; `scratch` [width] is used where the sum is not float32 in memory.
INLINED float norm_row(const void *hidden, int hidden_type, const void *added, int added_type, void *sum,
                       const float *weights, int halves, void *normed, int normed_type, float *scratch, int64_t width,
                       float epsilon) {
    const float *row = scratch;
    if (added != NULL) {
        float *kept = hidden_type == FLOAT32 ? sum : scratch;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            kept[i] = rounded(at(hidden, i, hidden_type) + at(added, i, added_type), hidden_type);
            if (hidden_type != FLOAT32) put(sum, i, kept[i], hidden_type);
        }
        row = kept;
    } else if (hidden_type == FLOAT32) {
        row = hidden;
    } else {
        load(scratch, hidden, 0, width, hidden_type);
    }
    float inverse = inverse_root(row, width, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
        put(normed, i, rounded(rounded(row[i] * inverse, hidden_type) * weights[i], halves), normed_type);
    return inverse;
}

// sum [rows, width] = hidden + added, unless that is NULL; normed = the sum's RMS norm; inverses [rows] = the
// inverse root mean squares.
void residual_norm(const void *hidden, int hidden_type, const void *added, int added_type, void *sum,
                   const void *weight, int weight_type, void *normed, int normed_type, float *inverses, int64_t rows,
                   int64_t width, float epsilon) {
    int halves = hidden_type == BFLOAT16 && weight_type == BFLOAT16 ? BFLOAT16 : FLOAT32;
    if (added == NULL) added_type = normed_type;  // none: the usual one, for what follows
#pragma omp parallel if (rows * width > ALONE)
    {
        float *scratch = malloc(2 * width * sizeof(float)), *weights = scratch + width, inverse;
        load(weights, weight, 0, width, weight_type);
#pragma omp for
        for (int64_t b = 0; b < rows; b++) {
            const void *h = moved(hidden, b * width, hidden_type);
            const void *a = added == NULL ? NULL : moved(added, b * width, added_type);
            void *to = (void *)moved(sum, b * width, hidden_type), *n = (void *)moved(normed, b * width, normed_type);
            // The usual types as constants.
            if (hidden_type == FLOAT32 && added_type == FLOAT32 && normed_type == FLOAT32)
                inverse = norm_row(h, FLOAT32, a, FLOAT32, to, weights, FLOAT32, n, FLOAT32, scratch, width, epsilon);
            else if (hidden_type == FLOAT32 && added_type == BFLOAT16 && normed_type == BFLOAT16)
                inverse = norm_row(h, FLOAT32, a, BFLOAT16, to, weights, FLOAT32, n, BFLOAT16, scratch, width, epsilon);
            else if (hidden_type == BFLOAT16 && added_type == BFLOAT16 && halves == BFLOAT16 && normed_type == BFLOAT16)
                inverse = norm_row(h, BFLOAT16, a, BFLOAT16, to, weights, BFLOAT16, n, BFLOAT16, scratch, width, epsilon);
            else
                inverse = norm_row(h, hidden_type, a, added_type, to, weights, halves, n, normed_type, scratch, width,
                                   epsilon);
            inverses[b] = inverse;
        }
        free(scratch);
    }
}

// The gradient of inputs [rows, width] whose norm has this gradient, added to `plus` unless that is NULL, and that of
// the weight [width] unless that is NULL; it then needs `parts` [rows / CHUNK, width] of zeros. With r = inverse:
// dx = r (g - x r^2 mean(g x)), g = dy w; dw = sum of dy x r.
void norm_gradients(const void *inputs, int inputs_type, const float *inverses, const void *weight, int weight_type,
                    const void *gradient, int gradient_type, const void *plus, int plus_type, void *found,
                    int found_type, float *of_weight, float *parts, int64_t rows, int64_t width) {
    int64_t chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel if (rows * width > ALONE)
    {
        float *scratch = malloc(3 * width * sizeof(float)), *g = scratch + width, *weights = g + width;
        load(weights, weight, 0, width, weight_type);
#pragma omp for
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t end = (chunk + 1) * CHUNK < rows ? (chunk + 1) * CHUNK : rows;
            for (int64_t b = chunk * CHUNK; b < end; b++) {
                const float *x = inputs_type == FLOAT32 ? (const float *)inputs + b * width : scratch;
                if (inputs_type != FLOAT32) load(scratch, inputs, b * width, width, inputs_type);
                load(g, gradient, b * width, width, gradient_type);
                float inverse = inverses[b], shared = 0.0f;
                if (of_weight != NULL) {
                    float *part = parts + chunk * width;
                    for (int64_t i = 0; i < width; i++) part[i] += g[i] * x[i] * inverse;
                }
#pragma omp simd reduction(+ : shared)
                for (int64_t i = 0; i < width; i++) {
                    g[i] *= weights[i];
                    shared += g[i] * x[i];
                }
                shared *= inverse * inverse / (float)width;
                for (int64_t i = 0; i < width; i++) g[i] = (g[i] - x[i] * shared) * inverse;
                if (plus != NULL && plus_type == FLOAT32)
                    for (int64_t i = 0; i < width; i++) g[i] += at(plus, b * width + i, FLOAT32);
                else if (plus != NULL)
                    for (int64_t i = 0; i < width; i++) g[i] += at(plus, b * width + i, BFLOAT16);
                store(found, b * width, g, width, found_type);
            }
        }
        free(scratch);
    }
    if (of_weight == NULL) return;
    memset(of_weight, 0, width * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t i = 0; i < width; i++) of_weight[i] += parts[chunk * width + i];
}

// Heads [positions, heads, width] turned by cos and sin [positions, width], or back where `way` is -1. sin has the signs
// of `rotate`.
void rotate_heads(const void *from, int from_type, const void *cos, const void *sin, int angle_type, void *to,
                  int to_type, int64_t positions, int64_t heads, int64_t width, int way) {
#pragma omp parallel if (positions * heads * width > ALONE)
    {
        float *c = malloc(2 * width * sizeof(float)), *s = c + width;
#pragma omp for
        for (int64_t n = 0; n < positions; n++) {
            load(c, cos, n * width, width, angle_type);
            load(s, sin, n * width, width, angle_type);
            for (int64_t d = 0; d < width; d++) s[d] *= (float)way;
            const void *here = moved(from, n * heads * width, from_type);
            void *there = (void *)moved(to, n * heads * width, to_type);
            if (from_type == FLOAT32 && to_type == FLOAT32) rotate(here, FLOAT32, c, s, there, FLOAT32, heads, width);
            else if (to_type == FLOAT32) rotate(here, BFLOAT16, c, s, there, FLOAT32, heads, width);
            else if (from_type == FLOAT32) rotate(here, FLOAT32, c, s, there, BFLOAT16, heads, width);
            else rotate(here, BFLOAT16, c, s, there, BFLOAT16, heads, width);
        }
        free(c);
    }
}

INLINED void silu_row(const void *gate, const void *up, int64_t start, void *product, int64_t place, int64_t width,
                      int type) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        float x = at(gate, start + i, type);
        put(product, place + i, rounded(x / (1.0f + exponential(-x)), type) * at(up, start + i, type), type);
    }
}

// product [rows, width] = silu(gate) up, all of one type; rows of gate and up lie `stride` numbers apart.
void silu_times(const void *gate, const void *up, void *product, int type, int64_t rows, int64_t width,
                int64_t stride) {
#pragma omp parallel for if (rows * width > ALONE)
    for (int64_t b = 0; b < rows; b++) {
        if (type == FLOAT32) silu_row(gate, up, b * stride, product, b * width, width, FLOAT32);
        else silu_row(gate, up, b * stride, product, b * width, width, BFLOAT16);
    }
}

INLINED void silu_gradient_row(const void *gate, const void *up, const void *gradient, void *of_gate, void *of_up,
                               int64_t start, int64_t width, int type) {
#pragma omp simd
    for (int64_t i = start; i < start + width; i++) {
        float x = at(gate, i, type), grad = at(gradient, i, type), sigmoid = 1.0f / (1.0f + exponential(-x));
        float through = rounded(grad * at(up, i, type), type) * (sigmoid * (1.0f + x * (1.0f - sigmoid)));
        put(of_up, i, rounded(x * sigmoid, type) * grad, type);
        put(of_gate, i, through, type);
    }
}

// Of `silu_times` with gate and up [rows, width] and the product's gradient: the gradients of both. That of `up` may lie
// where the product's gradient does. With s = 1 / (1 + e^-g): d silu / d g = s (1 + g (1 - s)).
void silu_gradients(const void *gate, const void *up, const void *gradient, void *of_gate, void *of_up, int type,
                    int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > ALONE)
    for (int64_t b = 0; b < rows; b++) {
        if (type == FLOAT32) silu_gradient_row(gate, up, gradient, of_gate, of_up, b * width, width, FLOAT32);
        else silu_gradient_row(gate, up, gradient, of_gate, of_up, b * width, width, BFLOAT16);
    }
}
