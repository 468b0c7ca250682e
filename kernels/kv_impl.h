/* The KV pages, as kernels.h lays them out: see ops_impl.h. */
#include "formats.h"

INLINE uint8_t *key_block(const kv_layer *kv, int64_t page, int64_t kv_head)
{
    return kv->keys + (size_t)(page * kv->shape.n_head_kv + kv_head) * kv->key_block_bytes;
}

INLINE uint8_t *value_block(const kv_layer *kv, int64_t page, int64_t kv_head)
{
    return kv->values + (size_t)(page * kv->shape.n_head_kv + kv_head) * kv->value_block_bytes;
}

INLINE void store_f16(uint16_t *to, int64_t stride, const float *from, int64_t n)
{
    uint16_t half[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        const int64_t rest = n - i < LANES ? n - i : LANES;
        vf_store_f16(half, rest == LANES ? vf_load(from + i) : vf_load_some(from + i, rest));
        for (int64_t j = 0; j < rest; j++)
            to[(i + j) * stride] = half[j];
    }
}

/* n <= KV_GROUP values as d * q, d = max|x| / 127, q to the nearest; returns d as float16. Infinity
 * and NaN are left to d. */
INLINE uint16_t quantize_group(const float *x, int64_t n, int8_t *q)
{
    const float high = largest_magnitude(x, n);
    const float inverse = high <= ACT_TINY ? 0.0f : 127.0f / high;
    for (int64_t i = 0; i < n; i++)
        q[i] = nearest_int8(x[i] * inverse);
    return f16_of_float(high / 127.0f);
}

/* n values, `stride` apart, from block on; their scales PAGE_TOKENS apart from scales on */
INLINE void store_q8_0(int8_t *block, int64_t stride, uint16_t *scales, const float *from,
                       int64_t n)
{
    int8_t q[KV_GROUP];
    for (int64_t i = 0; i < n; i += KV_GROUP, scales += PAGE_TOKENS) {
        const int64_t some = n - i < KV_GROUP ? n - i : KV_GROUP;
        *scales = quantize_group(from + i, some, q);
        for (int64_t j = 0; j < some; j++)
            block[(i + j) * stride] = q[j];
    }
}

/* Where the scales of a block of int8 begin */
INLINE uint16_t *scales_of(const uint8_t *block, int64_t length)
{
    return (uint16_t *)(block + PAGE_TOKENS * length);
}

static void store_kv(const kv_layer *kv, const float *k, const float *v, int32_t page, int32_t slot)
{
    const int64_t n_kv = kv->shape.n_head_kv, n_key = kv->shape.key_length,
                  n_value = kv->shape.value_length;
    for (int64_t h = 0; h < n_kv; h++, k += n_key, v += n_value) {
        uint8_t *key = key_block(kv, page, h), *value = value_block(kv, page, h);
        if (kv->type == KV_Q8_0) {
            store_q8_0((int8_t *)key + slot, PAGE_TOKENS, scales_of(key, n_key) + slot, k, n_key);
            store_q8_0((int8_t *)value + (int64_t)slot * kv->value_stride, 1,
                       scales_of(value, kv->value_stride) + slot, v, n_value);
        } else if (kv->type == KV_F16) {
            store_f16((uint16_t *)key + slot, PAGE_TOKENS, k, n_key);
            store_f16((uint16_t *)value + (int64_t)slot * kv->value_stride, 1, v, n_value);
        } else {
            for (int64_t i = 0; i < n_key; i++)
                ((float *)key)[i * PAGE_TOKENS + slot] = k[i];
            memcpy((float *)value + (int64_t)slot * kv->value_stride, v,
                   (size_t)n_value * sizeof(float));
        }
    }
}

/* The scales of group g of a block in a page */
INLINE void load_scales(const uint8_t *block, int64_t length, int64_t g, float *scale)
{
    for (int64_t j = 0; j < PAGE_TOKENS; j += LANES)
        vf_store(scale + j, vf_load_f16(scales_of(block, length) + g * PAGE_TOKENS + j));
}

/* A page of int8 as float32, laid out alike: keys (key_length, PAGE_TOKENS), values (PAGE_TOKENS,
 * value_stride) */
static void dequantize_page(const kv_layer *kv, const uint8_t *keys, const uint8_t *values,
                            float *restrict key_out, float *restrict value_out)
{
    const int64_t n_key = kv->shape.key_length, stride = kv->value_stride;
    const int8_t *codes = (const int8_t *)keys;
    float scale[PAGE_TOKENS];
    for (int64_t i = 0; i < n_key; i++) {
        if (i % KV_GROUP == 0)
            load_scales(keys, n_key, i / KV_GROUP, scale);
        for (int64_t slot = 0; slot < PAGE_TOKENS; slot++)
            key_out[i * PAGE_TOKENS + slot] = (float)codes[i * PAGE_TOKENS + slot] * scale[slot];
    }
    codes = (const int8_t *)values;
    for (int64_t c = 0; c < stride; c += 16) { /* a stride is a multiple of 16 */
        if (c % KV_GROUP == 0)
            load_scales(values, stride, c / KV_GROUP, scale);
        for (int64_t slot = 0; slot < PAGE_TOKENS; slot++)
            for (int64_t j = slot * stride + c; j < slot * stride + c + 16; j++)
                value_out[j] = (float)codes[j] * scale[slot];
    }
}
