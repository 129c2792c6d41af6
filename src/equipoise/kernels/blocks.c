// What a decoder block computes between its matrix products and attention, one call each, for decode steps and for
// training. Every function has a twin of torch's operations in the package that computes the same; tests hold the two
// together.
//
// Numbers are float32 or bfloat16 in memory, as a type says, and float32 in registers; they are rounded where torch
// rounds them. A row is computed in one order whatever the threads and the rows beside it, and sums over rows go by
// blocks of a fixed size, so results depend on neither. No function allocates what it returns, and none looks beyond the
// sizes that it is given.

#include "numbers.h"

#define CHUNK 64  // rows whose share of a weight's gradient is summed first

// sum [rows, width] = hidden + added, unless that is NULL; normed = the sum's RMS norm; inverses [rows], unless NULL, the
// inverse root mean squares. The sum may lie where hidden does.
void residual_norm(const void *hidden, int hidden_type, const void *added, int added_type, void *sum,
                   const void *weight, int weight_type, void *normed, int normed_type, float *inverses, int64_t rows,
                   int64_t width, float epsilon) {
    int halves = hidden_type == BFLOAT16 && weight_type == BFLOAT16 ? BFLOAT16 : FLOAT32;
#pragma omp parallel if (rows * width > ALONE)
    {
        float *row = malloc(3 * width * sizeof(float)), *other = row + width, *weights = other + width;
        load(weights, weight, 0, width, weight_type);
#pragma omp for
        for (int64_t b = 0; b < rows; b++) {
            load(row, hidden, b * width, width, hidden_type);
            if (added != NULL) {
                load(other, added, b * width, width, added_type);
                for (int64_t i = 0; i < width; i++) row[i] = rounded(row[i] + other[i], hidden_type);
                store(sum, b * width, row, width, hidden_type);
            }
            float inverse = 1.0f / sqrtf(squares(row, width) / (float)width + epsilon);
            if (inverses != NULL) inverses[b] = inverse;
            for (int64_t i = 0; i < width; i++)
                row[i] = rounded(rounded(row[i] * inverse, hidden_type) * weights[i], halves);
            store(normed, b * width, row, width, normed_type);
        }
        free(row);
    }
}

// The gradient of inputs [rows, width] whose norm has this gradient, added to `plus` unless that is NULL, and that of
// the weight [width] unless that is NULL. With r = inverse: dx = r (g - x r^2 mean(g x)), g = dy w; dw = sum of dy x r.
void norm_gradients(const void *inputs, int inputs_type, const float *inverses, const void *weight, int weight_type,
                    const void *gradient, int gradient_type, const void *plus, int plus_type, void *found,
                    int found_type, float *of_weight, int64_t rows, int64_t width) {
    int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    float *parts = of_weight == NULL ? NULL : calloc(chunks * width, sizeof(float));
#pragma omp parallel if (rows * width > ALONE)
    {
        float *x = malloc(4 * width * sizeof(float)), *g = x + width, *weights = g + width, *other = weights + width;
        load(weights, weight, 0, width, weight_type);
#pragma omp for
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t end = (chunk + 1) * CHUNK < rows ? (chunk + 1) * CHUNK : rows;
            for (int64_t b = chunk * CHUNK; b < end; b++) {
                load(x, inputs, b * width, width, inputs_type);
                load(g, gradient, b * width, width, gradient_type);
                float inverse = inverses[b], shared = 0.0f;
                if (parts != NULL) {
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
                if (plus != NULL) {
                    load(other, plus, b * width, width, plus_type);
                    for (int64_t i = 0; i < width; i++) g[i] += other[i];
                }
                store(found, b * width, g, width, found_type);
            }
        }
        free(x);
    }
    if (parts == NULL) return;
    memset(of_weight, 0, width * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t i = 0; i < width; i++) of_weight[i] += parts[chunk * width + i];
    free(parts);
}

// Heads [positions, heads, width] turned by cos and sin [positions, width], or back where `way` is -1. sin has the signs
// of `rotate`.
void rotate_heads(const void *from, int from_type, const void *cos, const void *sin, int angle_type, void *to,
                  int to_type, int64_t positions, int64_t heads, int64_t width, int way) {
#pragma omp parallel if (positions * heads * width > ALONE)
    {
        float *c = malloc(4 * width * sizeof(float)), *s = c + width, *head = s + width, *turned = head + width;
#pragma omp for
        for (int64_t n = 0; n < positions; n++) {
            load(c, cos, n * width, width, angle_type);
            load(s, sin, n * width, width, angle_type);
            for (int64_t d = 0; d < width; d++) s[d] *= (float)way;
            for (int64_t h = 0; h < heads; h++) {
                int64_t place = (n * heads + h) * width;
                load(head, from, place, width, from_type);
                rotate(turned, head, c, s, width);
                store(to, place, turned, width, to_type);
            }
        }
        free(c);
    }
}

// product [rows, width] = silu(gate) up, all of one type; rows of gate and up lie `stride` numbers apart.
void silu_times(const void *gate, const void *up, void *product, int type, int64_t rows, int64_t width,
                int64_t stride) {
#pragma omp parallel if (rows * width > ALONE)
    {
        float *g = malloc(2 * width * sizeof(float)), *u = g + width;
#pragma omp for
        for (int64_t b = 0; b < rows; b++) {
            load(g, gate, b * stride, width, type);
            load(u, up, b * stride, width, type);
            for (int64_t i = 0; i < width; i++) g[i] = rounded(g[i] / (1.0f + exponential(-g[i])), type) * u[i];
            store(product, b * width, g, width, type);
        }
        free(g);
    }
}

// Of `silu_times` with gate and up [rows, width] and the product's gradient: the gradients of both. They may lie where
// the product's gradient does. With s = 1 / (1 + e^-g): d silu / d g = s (1 + g (1 - s)).
void silu_gradients(const void *gate, const void *up, const void *gradient, void *of_gate, void *of_up, int type,
                    int64_t rows, int64_t width) {
#pragma omp parallel if (rows * width > ALONE)
    {
        float *g = malloc(3 * width * sizeof(float)), *u = g + width, *grad = u + width;
#pragma omp for
        for (int64_t b = 0; b < rows; b++) {
            load(g, gate, b * width, width, type);
            load(u, up, b * width, width, type);
            load(grad, gradient, b * width, width, type);
            for (int64_t i = 0; i < width; i++) {
                float x = g[i], sigmoid = 1.0f / (1.0f + exponential(-x));
                g[i] = rounded(grad[i] * u[i], type) * (sigmoid * (1.0f + x * (1.0f - sigmoid)));
                u[i] = rounded(x * sigmoid, type) * grad[i];
            }
            store(of_gate, b * width, g, width, type);
            store(of_up, b * width, u, width, type);
        }
        free(g);
    }
}
