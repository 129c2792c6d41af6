// What a decode step computes between its matrix products besides `blocks.c`: attention over the shared cache, sampling.
// How results are kept apart from threads and company: see `blocks.c`.

#include "numbers.h"

INLINED void head_norm(float *head, const float *weight, float epsilon, int64_t width) {
    float inverse = inverse_root(head, width, epsilon);
    for (int64_t d = 0; d < width; d++) head[d] = head[d] * inverse * weight[d];
}

#define CACHED (256 * 1024)  // bytes that stay near a core

#define LANES 8

typedef float lanes __attribute__((vector_size(4 * LANES)));  // two registers where one is shorter
typedef int32_t places __attribute__((vector_size(4 * LANES)));

static inline lanes read(const float *from) {
    lanes found;
    memcpy(&found, from, sizeof found);
    return found;
}

// Sums of neighbours, by halves of both: a0 + a1, a2 + a3, b0 + b1, b2 + b3, and the same of the second halves. Shuffles
// that stay within halves are one instruction.
INLINED lanes neighbours(lanes a, lanes b) {
    return __builtin_shuffle(a, b, (places){0, 2, 8, 10, 4, 6, 12, 14}) +
           __builtin_shuffle(a, b, (places){1, 3, 9, 11, 5, 7, 13, 15});
}

// The sum of every one of LANES vectors.
INLINED lanes sums_of(const lanes *parts) {
    lanes first = neighbours(neighbours(parts[0], parts[1]), neighbours(parts[2], parts[3]));
    lanes second = neighbours(neighbours(parts[4], parts[5]), neighbours(parts[6], parts[7]));
    return __builtin_shuffle(first, second, (places){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(first, second, (places){4, 5, 6, 7, 12, 13, 14, 15});
}

// scores[0 .. LANES) = query . keys[t], of which only the first `count` exist.
INLINED void scored_tile(float *restrict scores, const float *query, const float *keys, int64_t count, int64_t width) {
    lanes parts[LANES] = {0};
    for (int64_t d = 0; d < width; d += LANES) {
        lanes part = read(query + d);
#pragma GCC unroll 8
        for (int64_t i = 0; i < LANES; i++) parts[i] += part * read(keys + (i < count ? i : 0) * width + d);
    }
    lanes found = sums_of(parts);
    memcpy(scores, &found, sizeof found);
}

// scores[t] = query . keys[t] for t < count; what follows them up to a multiple of LANES has no meaning.
INLINED void scored(float *restrict scores, const float *query, const float *keys, int64_t count, int64_t width) {
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) scored_tile(scores + t, query, keys + t * width, LANES, width);
    if (t < count) scored_tile(scores + t, query, keys + t * width, count - t, width);
}

// total[0 .. vectors * LANES) += sum of weights[t] values[t]; the number of vectors is a constant where this is called.
INLINED void mixed(lanes *total, const float *weights, const float *values, int64_t count, int64_t width, int vectors) {
    for (int64_t t = 0; t < count; t++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) total[v] += weights[t] * read(values + t * width + v * LANES);
}

// Where weights and values of prompt and own tokens lie.
typedef struct {
    const float *weights, *prompt_values, *own_values;
    int64_t before, own;
    float sum;
} Mixture;

// Some columns of what is attended to.
INLINED void columns(float *out, Mixture of, int64_t first, int64_t width, int vectors) {
    lanes total[4] = {0};
    mixed(total, of.weights, of.prompt_values + first, of.before, width, vectors);
    mixed(total, of.weights + of.before, of.own_values + first, of.own, width, vectors);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        lanes found = total[v] / of.sum;
        memcpy(out + first + v * LANES, &found, sizeof found);
    }
}

// Attention of one scaled query to `before` prompt tokens and `own` tokens, whose softmax is one.
INLINED void attend(float *out, const float *query, const float *prompt_keys, const float *prompt_values,
                    int64_t before, const float *own_keys, const float *own_values, int64_t own, float *scores,
                    int64_t width) {
    scored(scores, query, prompt_keys, before, width);
    scored(scores + before, query, own_keys, own, width);
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < before + own; t++) most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < before + own; t++) {
        scores[t] = exponential(scores[t] - most);
        sum += scores[t];
    }
    Mixture of = {scores, prompt_values, own_values, before, own, sum};
    int64_t first = 0;
    for (; first + 4 * LANES <= width; first += 4 * LANES) columns(out, of, first, width, 4);
    for (; first < width; first += LANES) columns(out, of, first, width, 1);
}

// What `decode_attention` is given.
typedef struct {
    const void *projected;
    const float *cos, *sin, *query_norm, *key_norm, *prompt_keys, *prompt_values;
    float *own_keys, *own_values;
    const int64_t *prompt_of, *hidden_of, *lengths;
    void *attended;
    int64_t rows, queries, keys, room, length;
    float epsilon, scaling;
    int type, attended_type;
} Step;

// Ask for a row's own keys and values, which lie too scattered for the processor to guess.
INLINED void fetch(const Step *step, int64_t key, int64_t b, int64_t width) {
    int64_t own = (b * step->keys + key) * step->room * width;
    for (int64_t i = 0; i < step->lengths[b] * width; i += 16) {  // numbers in a line of the cache
        __builtin_prefetch(step->own_keys + own + i, 0, 2);
        __builtin_prefetch(step->own_values + own + i, 0, 2);
    }
}

// One key head of one row, and the query heads that share it.
INLINED void row_attention(const Step *step, int64_t key, int64_t b, float *scratch, int64_t width) {
    float *head = scratch, *query = head + width, *out = query + width, *scores = out + width;
    const float *cos = step->cos + b * width, *sin = step->sin + b * width;
    int64_t repeats = step->queries / step->keys, joined = b * (step->queries + 2 * step->keys) * width;
    int64_t own = (b * step->keys + key) * step->room * width, place = own + step->lengths[b] * width;
    int64_t hidden = step->hidden_of[step->prompt_of[b]], before = step->length - hidden;
    int64_t prompt = ((step->prompt_of[b] * step->keys + key) * step->length + hidden) * width;
    load(head, step->projected, joined + (step->queries + key) * width, width, step->type);
    if (step->key_norm != NULL) head_norm(head, step->key_norm, step->epsilon, width);
    rotate(head, FLOAT32, cos, sin, step->own_keys + place, FLOAT32, 1, width);
    load(step->own_values + place, step->projected, joined + (step->queries + step->keys + key) * width, width,
         step->type);
    for (int64_t r = 0; r < repeats; r++) {
        int64_t number = key * repeats + r;
        load(head, step->projected, joined + number * width, width, step->type);
        if (step->query_norm != NULL) head_norm(head, step->query_norm, step->epsilon, width);
        rotate(head, FLOAT32, cos, sin, query, FLOAT32, 1, width);
        for (int64_t d = 0; d < width; d++) query[d] *= step->scaling;
        attend(out, query, step->prompt_keys + prompt, step->prompt_values + prompt, before, step->own_keys + own,
               step->own_values + own, step->lengths[b] + 1, scores, width);
        store(step->attended, (b * step->queries + number) * width, out, width, step->attended_type);
    }
}

// One token per row: rotate its projected queries and keys, write keys and values behind the row's own, and attend to
// the row's prompt and its own tokens. projected [rows, (queries + 2 keys) width], cos and sin [rows, width], norms
// [width] or NULL, own [>= rows, keys, room, width], prompt [prompts, keys, length, width] of which the first
// hidden_of[prompt] are padding, lengths [rows] own tokens before this one; attended [rows, queries width]. The width
// of a head is a multiple of LANES.
void decode_attention(const void *projected, int type, const float *cos, const float *sin, const float *query_norm,
                      const float *key_norm, float epsilon, float *own_keys, float *own_values,
                      const float *prompt_keys, const float *prompt_values, const int64_t *prompt_of,
                      const int64_t *hidden_of, const int64_t *lengths, int64_t rows, int64_t queries, int64_t keys,
                      int64_t width, int64_t room, int64_t length, float scaling, void *attended, int attended_type) {
    Step step = {projected,  cos,       sin,       query_norm, key_norm, prompt_keys, prompt_values,
                 own_keys,   own_values, prompt_of, hidden_of,  lengths,  attended,    rows,
                 queries,    keys,      room,      length,     epsilon,  scaling,     type,
                 attended_type};
    // A row's own numbers lie side by side; but where a prompt is longer than the cache, its rows take a head in turn.
    int by_key = 2 * keys * length * width * (int64_t)sizeof(float) > CACHED;
#pragma omp parallel
    {
        float *scratch = malloc((3 * width + length + room + 2 * LANES) * sizeof(float));
#pragma omp for
        for (int64_t i = 0; i < keys * rows; i++) {
            if (i + 1 < keys * rows)
                fetch(&step, by_key ? (i + 1) / rows : (i + 1) % keys, by_key ? (i + 1) % rows : (i + 1) / keys, width);
            row_attention(&step, by_key ? i / rows : i % keys, by_key ? i % rows : i / keys, scratch, width);
        }
        free(scratch);
    }
}

#define BLOCK 64  // logits whose weights are summed before the running sum

static inline float weights_of(float *restrict weights, const float *restrict logits, int64_t count, float most,
                               float temperature) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        weights[i] = exponential(logits[i] / temperature - most);
        sum += weights[i];
    }
    return sum;
}

// tokens [rows]: the first entry whose cumulative weight exp(logit / temperature) exceeds the uniform number's share of
// the total; logprobs [rows] theirs. Where rounding leaves the share at or above a sum: the last entry of any weight.
void sample_tokens(const float *logits, const float *uniforms, int64_t rows, int64_t vocabulary, float temperature,
                   int64_t *tokens, float *logprobs) {
    int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
#pragma omp parallel if (rows * vocabulary > ALONE)
    {
        float *sums = malloc(blocks * sizeof(float)), weights[BLOCK];
#pragma omp for
        for (int64_t b = 0; b < rows; b++) {
            const float *row = logits + b * vocabulary;
            float most = -INFINITY;
#pragma omp simd reduction(max : most)
            for (int64_t i = 0; i < vocabulary; i++) most = row[i] > most ? row[i] : most;
            most /= temperature;
            double total = 0.0;
            for (int64_t n = 0; n < blocks; n++) {
                int64_t start = n * BLOCK, count = vocabulary - start < BLOCK ? vocabulary - start : BLOCK;
                sums[n] = weights_of(weights, row + start, count, most, temperature);
                total += sums[n];
            }
            double target = (double)uniforms[b] * total, before = 0.0;
            int64_t chosen = 0, last = 0;
            for (; chosen < blocks && before + sums[chosen] <= target; chosen++) {
                before += sums[chosen];
                if (sums[chosen] > 0.0f) last = chosen;
            }
            if (chosen == blocks) {
                chosen = last;
                target = INFINITY;
            }
            int64_t start = chosen * BLOCK, count = vocabulary - start < BLOCK ? vocabulary - start : BLOCK, token = 0;
            weights_of(weights, row + start, count, most, temperature);
            for (int64_t i = 0; i < count; i++) {
                before += weights[i];
                if (weights[i] > 0.0f) token = i;
                if (before > target) break;
            }
            tokens[b] = start + token;
            logprobs[b] = row[start + token] / temperature - most - (float)log(total);
        }
        free(sums);
    }
}
