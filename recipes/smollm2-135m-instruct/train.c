// Losses and gradients of the default drafter on segments of text, as mlx_redrafter/train/loss.py has them.
#include "common.h"

// A segment is SEGMENT positions in a row; MOST depths are drafted; the head reads HEAD_SEGMENTS at a time.
enum { SEGMENT = 32, MOST = 5, HEAD_SEGMENTS = 8, BLOCKS = 2 };

#define LIKELY .03f // a token that the model gives more somewhere in these segments is always drawn

// Where each tensor begins in the parameters, and how many these are.
static long rnn_w, rnn_u, rnn_bias, in_context, in_state, in_bias, block[BLOCKS], block_bias[BLOCKS], head, size;
static int tokens; // draft tokens, a multiple of 16
static const bf16 *embedding, *label_head; // the base model's: all rows, and those of draft tokens
static const int *to_draft;
static bf16 *rounded; // the parameters

static void round_to_bf16(bf16 *to, const float *from, long n) {
    for (long i = 0; i < n; i += 16) put(to + i, f32(from + i));
}

long layout(int draft_tokens) {
    long *places[] = {&rnn_w, &rnn_u, &rnn_bias, &in_context, &in_state, &in_bias, block, block_bias, block + 1,
                      block_bias + 1, &head};
    long sizes[] = {H * H, H * H, H, H * CONTEXT, H * H, H, H * H, H, H * H, H, (long)draft_tokens * H};
    size = 0, tokens = draft_tokens;
    for (int i = 0; i < 11; i++) *places[i] = size, size += sizes[i];
    return size;
}

void setup(const bf16 *model_embedding, const bf16 *model_head, const int *draft_ids, const float *parameters) {
    embedding = model_embedding, label_head = model_head, to_draft = draft_ids;
    rounded = large(2 * size);
    round_to_bf16(rounded, parameters, size);
}

// What one thread needs for up to n segments; see part.
typedef struct {
    int n;
    bf16 *context, *embedded, *hidden, *state, *input[BLOCKS + 1], *row;
    float *new, *prepared, *cell, *x[BLOCKS + 1], *linear[BLOCKS], *gradient, *new_gradient;
    __mmask16 *kept;
    float *labels, *some_labels, *logits, *shift, *share, *likeliest, *rows_gradient;
    bf16 *logits_gradient, *some_rows;
    int *drawn;
} Space;

static _Thread_local Space s;

static void make_space(int n) {
    if (s.n >= n) return;
    long m = (long)n * SEGMENT, rows = m * MOST, longer = (long)n * (SEGMENT + MOST), held = HEAD_SEGMENTS * SEGMENT;
    s.n = n;
    s.context = large(2 * m * CONTEXT), s.embedded = large(2 * longer * H), s.hidden = large(2 * longer * H);
    s.state = large(2 * rows * H), s.row = large(2 * rows * H), s.new = large(4 * longer * H);
    s.prepared = large(4 * m * H), s.cell = large(4 * rows * H), s.gradient = large(4 * rows * H);
    s.new_gradient = large(4 * longer * H), s.kept = large(rows * H / 8);
    for (int i = 0; i <= BLOCKS; i++) s.input[i] = large(2 * rows * H), s.x[i] = large(4 * rows * H);
    for (int i = 0; i < BLOCKS; i++) s.linear[i] = large(4 * rows * H);
    long label_rows = HEAD_SEGMENTS * (SEGMENT + MOST);
    s.labels = large(4 * label_rows * tokens), s.some_labels = large(4 * label_rows * tokens);
    s.logits = large(4 * held * MOST * tokens), s.logits_gradient = large(2 * held * MOST * tokens);
    s.shift = large(4 * tokens), s.share = large(4 * tokens), s.likeliest = large(4 * tokens);
    s.drawn = large(4 * tokens), s.some_rows = large(2l * tokens * H), s.rows_gradient = large(4l * tokens * H);
}

// c[m, n] (+)= a[m, k] b[k, n]
static void multiply_back(long m, long n, long k, const bf16 *a, const bf16 *b, float add, float *c) {
    cblas_gemm_bf16bf16f32(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, 1, a, k, b, n, add, c, n);
}

// c[n, k] += a[m, n]^T b[m, k], the gradient of a weight
static void outer(long m, long n, long k, const bf16 *a, const bf16 *b, float *c) {
    cblas_gemm_bf16bf16f32(CblasRowMajor, CblasTrans, CblasNoTrans, n, k, m, 1, a, n, b, k, 1, c, k);
}

static void sum_rows(float *to, const float *from, long rows) {
    for (long r = 0; r < rows; r++)
        for (int i = 0; i < H; i += 16) _mm512_storeu_ps(to + i, _mm512_add_ps(f32(to + i), f32(from + r * H + i)));
}

static inline __m512 silu_slope(__m512 x) {
    __m512 y = sigmoid(x), one = _mm512_set1_ps(1);
    return _mm512_mul_ps(y, _mm512_fmadd_ps(x, _mm512_sub_ps(one, y), one));
}

static inline uint64_t next(uint64_t *state) { // splitmix64
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// 16 bits, each set with probability of_256 / 256
static inline __mmask16 coins(uint64_t *random, int of_256) {
    uint64_t low = next(random), high = next(random);
    return _mm_cmplt_epu8_mask(_mm_set_epi64x(high, low), _mm_set1_epi8((char)of_256));
}

static float top_of(const float *row, int n) {
    __m512 top = _mm512_set1_ps(-1e30f);
    for (int j = 0; j < n; j += 16) top = _mm512_max_ps(top, f32(row + j));
    return _mm512_reduce_max_ps(top);
}

// row = 2^(row scale - top), whose sum is returned
static float powers(float *row, int n, float scale, float top) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < n; j += 16) {
        __m512 y = power2(_mm512_fmsub_ps(f32(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(top)));
        sum = _mm512_add_ps(sum, y);
        _mm512_storeu_ps(row + j, y);
    }
    return _mm512_reduce_add_ps(sum);
}

static void scale_row(float *row, int n, float factor) {
    for (int j = 0; j < n; j += 16) _mm512_storeu_ps(row + j, _mm512_mul_ps(f32(row + j), _mm512_set1_ps(factor)));
}

// The draft tokens that some labels find likely, and of_256 of the others, which stand for all of these.
static int draw(long label_rows, int of_256, uint64_t *random) {
    int count = 0;
    float weight = 256.f / of_256;
    memset(s.likeliest, 0, 4 * (size_t)tokens);
    for (long r = 0; r < label_rows; r++)
        for (int j = 0; j < tokens; j += 16)
            _mm512_storeu_ps(s.likeliest + j, _mm512_max_ps(f32(s.likeliest + j), f32(s.labels + r * tokens + j)));
    int spare[16], spares = 0; // to make a multiple of 16
    __mmask16 chance = 0;
    for (int j = 0; j < tokens; j++) {
        if (j % 16 == 0) chance = coins(random, of_256);
        int likely = s.likeliest[j] > LIKELY;
        if (likely || (chance >> j % 16 & 1)) {
            s.drawn[count] = j, s.share[count] = likely ? 1 : weight, s.shift[count++] = likely ? 0 : log2f(weight);
        } else if (spares < 16) {
            spare[spares++] = j;
        }
    }
    while (count % 16) s.drawn[count] = spare[--spares], s.share[count] = weight, s.shift[count++] = log2f(weight);
    for (int k = 0; k < count; k++) memcpy(s.some_rows + (long)k * H, rounded + head + (long)s.drawn[k] * H, 2 * H);
    for (long r = 0; r < label_rows; r++) {
        float *to = s.some_labels + r * count;
        __m512 sum = _mm512_setzero_ps();
        for (int k = 0; k < count; k += 16) {
            __m512 label = _mm512_i32gather_ps(_mm512_loadu_si512(s.drawn + k), s.labels + r * tokens, 4);
            _mm512_storeu_ps(to + k, _mm512_mul_ps(label, f32(s.share + k)));
            sum = _mm512_add_ps(sum, f32(to + k));
        }
        scale_row(to, count, 1 / (_mm512_reduce_add_ps(sum) + 1e-9f));
    }
    return count;
}

// Kullback-Leibler divergence, less the label's entropy, of natural logits; they become weight times its gradient.
static float divergence(float *logits, const float *label, int n, float weight, bf16 *gradient) {
    __m512 product = _mm512_setzero_ps();
    for (int j = 0; j < n; j += 16) {
        product = _mm512_fmadd_ps(f32(logits + j), f32(label + j), product);
        _mm512_storeu_ps(logits + j, _mm512_fmadd_ps(f32(logits + j), _mm512_set1_ps(LOG2_E), f32(s.shift + j)));
    }
    float top = top_of(logits, n), sum = powers(logits, n, 1, top);
    for (int j = 0; j < n; j += 16) {
        __m512 wanted = _mm512_mul_ps(f32(label + j), _mm512_set1_ps(weight));
        put(gradient + j, _mm512_fmsub_ps(f32(logits + j), _mm512_set1_ps(weight / sum), wanted));
    }
    return top / LOG2_E + logf(sum) - _mm512_reduce_add_ps(product);
}

// The last layer on segments first to first + n: losses, and gradients of its weights and of what it reads.
static void read_head(int first, int n, long m, int length, const float *weights, const int *const *text,
                      const int *const *left, int negatives, uint64_t *random, float *gradients, double *losses) {
    int longer = SEGMENT + length - 1, count = tokens;
    long label_rows = (long)n * longer, begin = (long)first * SEGMENT, rows = (long)n * SEGMENT;
    multiply(label_rows, tokens, H, s.hidden + (long)first * longer * H, label_head, 0, s.labels);
    for (long r = 0; r < label_rows; r++) {
        float *label = s.labels + r * tokens;
        scale_row(label, tokens, 1 / powers(label, tokens, LOG2_E, LOG2_E * top_of(label, tokens)));
    }
    int all = negatives == 256;
    if (all) memset(s.shift, 0, 4 * (size_t)tokens);
    else count = draw(label_rows, negatives, random);
    const bf16 *head_rows = all ? rounded + head : s.some_rows;
    const float *labels = all ? s.labels : s.some_labels;
    for (int d = 0; d < length; d++)
        multiply(rows, count, H, s.input[BLOCKS] + (d * m + begin) * H, head_rows, 0, s.logits + d * rows * count);
    for (long r = 0; r < rows; r++) {
        long segment = r / SEGMENT, t = r % SEGMENT;
        int reachable = 1;
        for (int d = 0; d < length; d++) {
            bf16 *gradient = s.logits_gradient + (d * rows + r) * count;
            int token = text[first + segment][t + d + 1];
            reachable = reachable && left[first + segment][t] > d && to_draft[token] >= 0;
            if (!reachable) {
                memset(gradient, 0, 2 * (size_t)count);
                continue;
            }
            const float *label = labels + (segment * longer + t + d) * count;
            losses[2 * d] += divergence(s.logits + (d * rows + r) * count, label, count, weights[d], gradient);
            losses[2 * d + 1] += 1;
        }
    }
    for (int d = 0; d < length; d++) {
        const bf16 *gradient = s.logits_gradient + d * rows * count;
        multiply_back(rows, H, count, gradient, head_rows, 0, s.gradient + (d * m + begin) * H);
        memcpy(s.row + d * rows * H, s.input[BLOCKS] + (d * m + begin) * H, 2 * rows * H);
    }
    if (all) {
        outer(rows * length, tokens, H, s.logits_gradient, s.row, gradients + head);
        return;
    }
    memset(s.rows_gradient, 0, 4 * (size_t)count * H);
    outer(rows * length, count, H, s.logits_gradient, s.row, s.rows_gradient);
    for (int k = 0; k < count; k++) sum_rows(gradients + head + (long)s.drawn[k] * H, s.rows_gradient + (long)k * H, 1);
}

// Losses [length][2] (sum and positions) and gradients, both added to.
//
// context, text, left: for each of n segments, the first of its positions' context, token and left (features.py).
// keep, negatives: of 256, how many inputs dropout keeps and how many unlikely tokens are drawn; 256 is all.
void part(int n, const bf16 *const *context, const int *const *text, const int *const *left, int length, float decay,
          int keep, int negatives, uint64_t seed, const float *parameters, float *gradients, double *losses) {
    long m = (long)n * SEGMENT, rows = m * length;
    int longer = SEGMENT + length - 1;
    uint64_t random = seed;
    __m512 grown = _mm512_set1_ps(256.f / keep);
    float weights[MOST] = {1};
    for (int d = 1; d < length; d++) weights[d] = weights[d - 1] * decay;
    make_space(n);
    for (int i = 0; i < n; i++) {
        for (long j = 0; j < SEGMENT * CONTEXT; j += 16) {
            __mmask16 kept = keep == 256 ? 0xffff : coins(&random, keep);
            put(s.context + i * SEGMENT * CONTEXT + j, _mm512_maskz_mul_ps(kept, get(context[i] + j), grown));
        }
        for (int t = 0; t < longer; t++) {
            memcpy(s.embedded + ((long)i * longer + t) * H, embedding + (long)text[i][t] * H, 2 * H);
            memcpy(s.hidden + ((long)i * longer + t) * H, context[i] + (t + 1) * CONTEXT, 2 * H);
        }
    }
    // The cell, depth after depth, then the rest of all depths together; row d * m + r is depth d of position r.
    multiply((long)n * longer, H, H, s.embedded, rounded + rnn_w, 0, s.new);
    multiply(m, H, CONTEXT, s.context, rounded + in_context, 0, s.prepared);
    memset(s.cell, 0, 4 * m * H);
    for (int d = 0; d < length; d++) {
        float *cell = s.cell + d * m * H;
        if (d) multiply(m, H, H, s.state + (d - 1) * m * H, rounded + rnn_u, 0, cell);
        for (long r = 0; r < m; r++)
            for (int j = 0; j < H; j += 16) {
                __m512 new = f32(s.new + (r / SEGMENT * longer + r % SEGMENT + d) * H + j);
                __m512 y = _mm512_add_ps(_mm512_add_ps(f32(cell + r * H + j), new), f32(parameters + rnn_bias + j));
                _mm512_storeu_ps(cell + r * H + j, y);
                put(s.state + (d * m + r) * H + j, silu(y));
            }
    }
    multiply(rows, H, H, s.state, rounded + in_state, 0, s.x[0]);
    for (long r = 0; r < rows; r++)
        for (int j = 0; j < H; j += 16) {
            __m512 share = _mm512_add_ps(f32(s.prepared + r % m * H + j), f32(parameters + in_bias + j));
            _mm512_storeu_ps(s.x[0] + r * H + j, _mm512_add_ps(f32(s.x[0] + r * H + j), share));
        }
    round_to_bf16(s.input[0], s.x[0], rows * H);
    for (int b = 0; b < BLOCKS; b++) {
        multiply(rows, H, H, s.input[b], rounded + block[b], 0, s.linear[b]);
        for (long i = 0; i < rows * H; i += 16) {
            __m512 y = _mm512_add_ps(f32(s.linear[b] + i), f32(parameters + block_bias[b] + i % H));
            _mm512_storeu_ps(s.linear[b] + i, y);
            y = _mm512_add_ps(f32(s.x[b] + i), silu(y));
            if (b == BLOCKS - 1) {
                s.kept[i / 16] = keep == 256 ? 0xffff : coins(&random, keep);
                y = _mm512_maskz_mul_ps(s.kept[i / 16], y, grown);
            }
            _mm512_storeu_ps(s.x[b + 1] + i, y);
            put(s.input[b + 1] + i, y);
        }
    }
    for (int i = 0; i < n; i += HEAD_SEGMENTS) {
        int some = n - i < HEAD_SEGMENTS ? n - i : HEAD_SEGMENTS;
        read_head(i, some, m, length, weights, text, left, negatives, &random, gradients, losses);
    }
    // And back.
    for (long i = 0; i < rows * H; i += 16)
        _mm512_storeu_ps(s.gradient + i, _mm512_maskz_mul_ps(s.kept[i / 16], f32(s.gradient + i), grown));
    for (int b = BLOCKS - 1; b >= 0; b--) {
        for (long i = 0; i < rows * H; i += 16) {
            __m512 y = _mm512_mul_ps(f32(s.gradient + i), silu_slope(f32(s.linear[b] + i)));
            _mm512_storeu_ps(s.linear[b] + i, y);
            put(s.row + i, y);
        }
        sum_rows(gradients + block_bias[b], s.linear[b], rows);
        outer(rows, H, H, s.row, s.input[b], gradients + block[b]);
        multiply_back(rows, H, H, s.row, rounded + block[b], 1, s.gradient);
    }
    round_to_bf16(s.row, s.gradient, rows * H);
    outer(rows, H, H, s.row, s.state, gradients + in_state);
    multiply_back(rows, H, H, s.row, rounded + in_state, 0, s.x[0]); // by the states
    memcpy(s.prepared, s.gradient, 4 * m * H);
    for (long i = m * H; i < rows * H; i += 16)
        _mm512_storeu_ps(s.prepared + i % (m * H), _mm512_add_ps(f32(s.prepared + i % (m * H)), f32(s.gradient + i)));
    sum_rows(gradients + in_bias, s.prepared, m);
    round_to_bf16(s.row, s.prepared, m * H);
    outer(m, H, CONTEXT, s.row, s.context, gradients + in_context);
    memset(s.new_gradient, 0, 4 * (size_t)n * longer * H);
    for (int d = length - 1; d >= 0; d--) {
        const float *by_state = s.x[0] + d * m * H;
        for (long r = 0; r < m; r++)
            for (int j = 0; j < H; j += 16) {
                float *new = s.new_gradient + (r / SEGMENT * longer + r % SEGMENT + d) * H + j;
                __m512 slope = silu_slope(f32(s.cell + (d * m + r) * H + j));
                __m512 y = _mm512_mul_ps(f32(by_state + r * H + j), slope);
                put(s.row + r * H + j, y);
                _mm512_storeu_ps(new, _mm512_add_ps(f32(new), y));
            }
        if (d) {
            outer(m, H, H, s.row, s.state + (d - 1) * m * H, gradients + rnn_u);
            multiply_back(m, H, H, s.row, rounded + rnn_u, 1, s.x[0] + (d - 1) * m * H);
        }
    }
    sum_rows(gradients + rnn_bias, s.new_gradient, (long)n * longer);
    round_to_bf16(s.row, s.new_gradient, (long)n * longer * H);
    outer((long)n * longer, H, H, s.row, s.embedded, gradients + rnn_w);
}

double squares(long from, long to, const float *a, const float *b) {
    double sum = 0;
    for (long i = from; i < to; i++) sum += (double)(a[i] + b[i]) * (a[i] + b[i]);
    return sum;
}

// AdamW (arXiv 1711.05101) on a part of the parameters with the sum of two gradients, which become zero; average
// moves by share towards the parameters.
void update(long from, long to, float *parameters, float *first, float *second, float *a, float *b, float *average,
            float factor, float rate, float decay, float correct_first, float correct_second, float share) {
    for (long i = from; i < to; i++) {
        float gradient = (a[i] + b[i]) * factor;
        a[i] = b[i] = 0;
        first[i] = .9f * first[i] + .1f * gradient;
        second[i] = .98f * second[i] + .02f * gradient * gradient;
        float step = first[i] / correct_first / (sqrtf(second[i] / correct_second) + 1e-8f);
        parameters[i] = parameters[i] * (1 - rate * decay) - rate * step;
        average[i] += share * (parameters[i] - average[i]);
    }
    round_to_bf16(rounded + from, parameters + from, to - from);
}
