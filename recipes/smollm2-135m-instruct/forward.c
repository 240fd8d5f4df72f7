// SmolLM2-135M's forward pass for a batch of rows at one common position, after Llama's (arXiv 2302.13971).
#include "common.h"

enum { LAYERS = 30, QUERIES = 9, GROUPS = 3, D = 64, INNER = 1536, VOCABULARY = 49152 };
enum { QKV = (QUERIES + 2 * GROUPS) * D, SHARE = QUERIES / GROUPS, TOKENS = 8, LONGEST = 2048 };

typedef struct {
    const bf16 *qkv, *output, *gate_up, *down;
    const float *before_attention, *before_mlp;
    bf16 *keys, *values; // [batch, GROUPS, capacity, D]; see attend for the order of the last two
} Layer;

static Layer layers[LAYERS];
static const bf16 *embedding;
static const float *last_norm;
static int batch, capacity, layers_read[3];
static float *cosines, *sines; // [capacity, D / 2]
static float *x, *wide;        // [rows, H] and the widest of what comes between
static bf16 *narrow, *inner;   // products' inputs

// matrices: four per layer and the embedding; norms: two per layer and the last
void setup(const bf16 *const *matrices, const float *const *norms, int rows, int longest, const int *read) {
    batch = rows, capacity = (longest + 31) / 32 * 32;
    long cache = (long)batch * GROUPS * capacity * D;
    for (int i = 0; i < LAYERS; i++) {
        const bf16 *const *m = matrices + 4 * i;
        layers[i] = (Layer){m[0], m[1], m[2], m[3], norms[2 * i], norms[2 * i + 1], large(2 * cache), large(2 * cache)};
        memset(layers[i].keys, 0, 2 * cache);
        memset(layers[i].values, 0, 2 * cache);
    }
    embedding = matrices[4 * LAYERS], last_norm = norms[2 * LAYERS];
    memcpy(layers_read, read, sizeof layers_read);
    cosines = malloc(sizeof(float) * capacity * D / 2), sines = malloc(sizeof(float) * capacity * D / 2);
    for (int t = 0; t < capacity; t++)
        for (int i = 0; i < D / 2; i++) {
            double angle = t * pow(100000.0, -2.0 * i / D);
            cosines[t * D / 2 + i] = cos(angle), sines[t * D / 2 + i] = sin(angle);
        }
    long most = (long)batch * TOKENS;
    x = large(4 * most * H), wide = large(4 * most * 2 * INNER);
    narrow = large(2 * most * H), inner = large(2 * most * INNER);
}

static void normalize(bf16 *to, const float *from, const float *weight, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < H; i += 16) sum = _mm512_fmadd_ps(f32(from + i), f32(from + i), sum);
    __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(sum) / H + epsilon));
    for (int i = 0; i < H; i += 16) {
        __m512 y = _mm512_mul_ps(f32(from + i), scale);
        put(to + i, weight ? _mm512_mul_ps(y, f32(weight + i)) : y);
    }
}

// The product of all rows of one token each, by far the most frequent, has its weights packed once.
static void linear(int number, long m, int n, int k, const bf16 *a, const bf16 *weight, float add, float *c) {
    static void *packed[4 * LAYERS + 1];
    if (m != batch) {
        multiply(m, n, k, a, weight, add, c);
        return;
    }
    if (!packed[number]) {
        packed[number] = large(cblas_gemm_bf16bf16f32_pack_get_size(CblasBMatrix, m, n, k));
        cblas_gemm_bf16bf16f32_pack(CblasRowMajor, CblasBMatrix, CblasTrans, m, n, k, weight, k, packed[number]);
    }
    cblas_gemm_bf16bf16f32_compute(
        CblasRowMajor, CblasNoTrans, CblasPacked, m, n, k, 1, a, k, packed[number], k, add, c, n);
}

static inline bf16 rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void rotate(float *heads, int count, int position) {
    const float *c = cosines + position * D / 2, *s = sines + position * D / 2;
    for (float *head = heads; head < heads + count * D; head += D)
        for (int i = 0; i < D / 2; i += 16) {
            __m512 a = f32(head + i), b = f32(head + i + D / 2);
            _mm512_storeu_ps(head + i, _mm512_fmsub_ps(a, f32(c + i), _mm512_mul_ps(b, f32(s + i))));
            _mm512_storeu_ps(head + i + D / 2, _mm512_fmadd_ps(a, f32(s + i), _mm512_mul_ps(b, f32(c + i))));
        }
}

static inline __m512bh pair(uint32_t two) { return (__m512bh)_mm512_set1_epi32((int)two); }

static inline __m512bh pairs(const bf16 *from) { return (__m512bh)_mm512_loadu_si512(from); }

// A group's query heads over keys in blocks of 16 positions, [D / 2][16][2], and values in twos, [D][2].
static void attend(const Layer *layer, int row, int group, int position, float *qkv, bf16 *out) {
    float scores[SHARE][LONGEST] __attribute__((aligned(64)));
    bf16 weights[SHARE][LONGEST] __attribute__((aligned(64)));
    uint32_t query[SHARE][D / 2];
    long start = ((long)row * GROUPS + group) * capacity * D;
    bf16 *keys = layer->keys + start, *values = layer->values + start;
    const float *key = qkv + (QUERIES + group) * D, *value = key + GROUPS * D;
    bf16 *block = keys + position / 16 * 16 * D, *two = values + position / 2 * 2 * D;
    for (int d = 0; d < D; d++) {
        block[d / 2 * 32 + position % 16 * 2 + d % 2] = rounded(key[d]);
        two[2 * d + position % 2] = rounded(value[d]);
    }
    for (int j = 0; j < SHARE; j++) {
        const float *q = qkv + (group * SHARE + j) * D;
        for (int i = 0; i < D / 2; i++)
            query[j][i] = rounded(q[2 * i] * 0.125f) | (uint32_t)rounded(q[2 * i + 1] * 0.125f) << 16;
    }
    int blocks = position / 16 + 1;
    __m512 never = _mm512_set1_ps(-1e30f), top[SHARE] = {never, never, never};
    for (int u = 0; u < blocks; u++) {
        __m512 sum[2][SHARE] = {0};
        const bf16 *k = keys + u * 16 * D;
        for (int i = 0; i < D / 2; i++) _mm_prefetch((const char *)(k + 3 * 16 * D + i * 32), _MM_HINT_T0);
        for (int i = 0; i < D / 2; i++)
            for (int j = 0; j < SHARE; j++)
                sum[i % 2][j] = _mm512_dpbf16_ps(sum[i % 2][j], pairs(k + i * 32), pair(query[j][i]));
        __mmask16 known = u < blocks - 1 ? 0xffff : (__mmask16)((2u << position % 16) - 1);
        for (int j = 0; j < SHARE; j++) {
            __m512 score = _mm512_mask_add_ps(never, known, sum[0][j], sum[1][j]);
            top[j] = _mm512_max_ps(top[j], score);
            _mm512_store_ps(scores[j] + u * 16, score);
        }
    }
    __m512 scale[SHARE], found[SHARE][D / 16] = {0};
    for (int j = 0; j < SHARE; j++) {
        __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top[j])), sum = _mm512_setzero_ps();
        for (int i = 0; i < blocks * 16; i += 16) {
            __m512 above = _mm512_sub_ps(_mm512_load_ps(scores[j] + i), most);
            __m512 weight = power2(_mm512_mul_ps(above, _mm512_set1_ps(LOG2_E)));
            // positions to come weigh 2^-126, which is nothing
            sum = _mm512_add_ps(sum, weight);
            put(weights[j] + i, weight);
        }
        scale[j] = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    }
    for (int u = 0; u <= position / 2; u++) {
        const bf16 *v = values + u * 2 * D;
        for (int i = 0; i < D / 16; i++) _mm_prefetch((const char *)(v + 32 * D + i * 32), _MM_HINT_T0);
        for (int j = 0; j < SHARE; j++)
            for (int i = 0; i < D / 16; i++)
                found[j][i] = _mm512_dpbf16_ps(found[j][i], pairs(v + i * 32), pair(((uint32_t *)weights[j])[u]));
    }
    for (int j = 0; j < SHARE; j++)
        for (int i = 0; i < D / 16; i++)
            put(out + (group * SHARE + j) * D + i * 16, _mm512_mul_ps(found[j][i], scale[j]));
}

// Up to TOKENS columns of tokens [batch, stride] from the first on.
static void part(const int *tokens, int stride, int first, int n, int offset, bf16 *features, float *logits) {
    long rows = (long)batch * n;
    for (long r = 0; r < rows; r++) {
        const bf16 *row = embedding + (long)tokens[r / n * stride + first + r % n] * H;
        for (int i = 0; i < H; i += 16) _mm512_storeu_ps(x + r * H + i, get(row + i));
    }
    for (int i = 0; i < LAYERS; i++) {
        const Layer *layer = layers + i;
        for (long r = 0; r < rows; r++) normalize(narrow + r * H, x + r * H, layer->before_attention, 1e-5f);
        linear(4 * i, rows, QKV, H, narrow, layer->qkv, 0, wide);
        for (long r = 0; r < rows; r++) {
            rotate(wide + r * QKV, QUERIES + GROUPS, offset + r % n);
            for (int group = 0; group < GROUPS; group++)
                attend(layer, r / n, group, offset + r % n, wide + r * QKV, narrow + r * H);
        }
        linear(4 * i + 1, rows, H, H, narrow, layer->output, 1, x);
        for (long r = 0; r < rows; r++) normalize(narrow + r * H, x + r * H, layer->before_mlp, 1e-5f);
        linear(4 * i + 2, rows, 2 * INNER, H, narrow, layer->gate_up, 0, wide);
        for (long r = 0; r < rows; r++)
            for (int k = 0; k < INNER; k += 16) {
                const float *gate = wide + r * 2 * INNER + k;
                put(inner + r * INNER + k, _mm512_mul_ps(silu(f32(gate)), f32(gate + INNER)));
            }
        linear(4 * i + 3, rows, H, INNER, inner, layer->down, 1, x);
        for (int j = 0; j < 3; j++)
            for (long r = 0; r < rows && layers_read[j] == i + 1; r++)
                normalize(features + (r / n * stride + first + r % n) * CONTEXT + (j + 1) * H, x + r * H, NULL, 1e-6f);
    }
    for (long r = 0; r < rows; r++) {
        normalize(narrow + r * H, x + r * H, last_norm, 1e-5f);
        memcpy(features + (r / n * stride + first + r % n) * CONTEXT, narrow + r * H, 2 * H);
        if (r % n == n - 1) memcpy(inner + r / n * H, narrow + r * H, 2 * H);
    }
    if (logits) linear(4 * LAYERS, batch, VOCABULARY, H, inner, embedding, 0, logits);
}

// Tokens [batch, n] at positions offset and after -> hidden states [batch, n, CONTEXT], the last column's logits.
void forward(const int *tokens, int n, int offset, bf16 *features, float *logits) {
    for (int first = 0; first < n; first += TOKENS) {
        int count = n - first < TOKENS ? n - first : TOKENS;
        part(tokens, n, first, count, offset + first, features, first + count == n ? logits : NULL);
    }
}
