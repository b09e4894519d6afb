/* Decode one view of a JPEG with libjpeg-turbo: only the part that the view needs, resized on the way, to uint8 RGB.

   The pixels are those of Pillow's full decode, crop and antialiased bilinear resize: the same filter weights in 22-bit
   fixed point, the horizontal pass before the vertical one, each pass rounded to 8 bits. Decoding returns an error code
   if libjpeg warns or fails, and for images other than 8-bit gray, YCbCr or RGB in Huffman coding. The caller then uses
   Pillow. EXIF is ignored.

   This file is built at installation if a C compiler and libjpeg-turbo's headers are available; pillow.py works without
   it. It has no static state. Tests define LARS_WITHOUT_PYTHON to compile without Python, and LARS_PLAIN_C to compile
   without vector instructions. */

#ifndef LARS_WITHOUT_PYTHON
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#endif
#include <limits.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000090
#error "libjpeg-turbo 2.1 or newer is required"
#endif

/* One build runs on every x86-64 processor and uses AVX2 where available. */
#ifdef __GNUC__
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(LARS_PLAIN_C)
#define HAVE_AVX2
#define AVX2 __attribute__((target("avx2")))
#include <immintrin.h>
#endif

/* The same numbers as in pillow.py. */
#define MAX_PIXELS ((1u << 30) / 12)
#define MAX_SCANS 500
#define MAX_SCANNED ((uint64_t)32 * MAX_PIXELS)
/* The memory that libjpeg may use for the coefficients of an image in several scans. They take at most 6 bytes per
   pixel, so 44 million pixels always fit. */
#define MAX_MEMORY (256L << 20)

/* As in Pillow: sums of products of an 8-bit pixel and a 22-bit weight fit into 32 bits. */
#define WEIGHT_BITS 22
#define HALF (1 << (WEIGHT_BITS - 1))
/* Bytes after each row of pixels that vector instructions may read or write. */
#define SLACK 32
/* Bytes of an output row that resize_down computes at a time. */
#define BLOCK 32
/* With more weights, their rounding errors could add up to a level above 255. */
#define MAX_TAPS 16000
/* Rows read from libjpeg at a time: with 4:2:0, it produces two at once. */
#define ROWS 2
/* Output pixels of a row computed at a time with vectors. */
#define GROUP 4
/* Output pixels whose weights are computed at a time; a multiple of GROUP. */
#define STRIP 8

enum { OK = 0, REFUSED = 1, DAMAGED = 2, CUT_SHORT = 3, TOO_MUCH = 4 };

/* `width`, `height`: the size that the image must have. `left` to `bottom`: the crop box. `new_width`, `new_height`:
   the size to which the box is resized. `x`, `y`: the left and top corner of the window in the resized box. `size`: the
   side of the window. The window is the output; beyond the box, it has zeros. */
typedef struct {
    int width, height, left, top, right, bottom, new_width, new_height, x, y, flip, size;
} View;

/* The plan to resize one axis. `first`, `weights`: for each output pixel, in output order, its first input pixel and
   its `taps` weights, of which the last may be zeros. The output pixels lie at `from` to `from + count` in the window.
   They depend on the input pixels `begin` to `end`. */
typedef struct {
    int count, from, taps, begin, end;
    int *first;
    int32_t *weights;
    /* The weights in the order that the vector code reads; unused without vectors. */
    int32_t *spread;
} Axis;

/* Input pixels along an axis, input pixels per output pixel, half the width of the triangle filter, and its inverse. */
typedef struct {
    int in;
    double scale, support, inverse;
} Filter;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf back;
    int code;
    const uint8_t *data;
    size_t length;
    const View *view;
    uint8_t *out;
    Axis across, down;
    void *memory[6];
    void (*set_weights)(const Filter *, int, int, const int *, const int *, int, int, double *, int32_t *);
    void (*resize_across)(const Axis *, int, const uint8_t *const *, uint8_t *const *);
    void (*resize_down)(const uint8_t *const *, const int32_t *, int, int, uint8_t *);
} Job;

static Job *job_of(j_common_ptr jpeg) { return (Job *)jpeg->client_data; }

static void fail(Job *job, int code) {
    job->code = code;
    longjmp(job->back, 1);
}

static void on_error(j_common_ptr jpeg) { fail(job_of(jpeg), DAMAGED); }

static void on_message(j_common_ptr jpeg, int level) {
    /* A warning: the data end early or are invalid. */
    if (level < 0) fail(job_of(jpeg), DAMAGED);
}

static void ignore_message(j_common_ptr jpeg) { (void)jpeg; }

static void on_progress(j_common_ptr jpeg) {
    /* A few bytes can request any number of scans over the whole image. */
    const j_decompress_ptr reader = (j_decompress_ptr)jpeg;
    const uint64_t scans = (uint64_t)reader->input_scan_number, pixels = (uint64_t)reader->image_width * reader->image_height;
    if (scans > MAX_SCANS || scans * pixels > MAX_SCANNED) fail(job_of(jpeg), TOO_MUCH);
}

static void *allocate(Job *job, int slot, size_t count, size_t bytes) {
    if (bytes && count > (size_t)PTRDIFF_MAX / 2 / bytes) fail(job, TOO_MUCH);
    job->memory[slot] = malloc(count * bytes + 1);
    if (!job->memory[slot]) fail(job, TOO_MUCH);
    return job->memory[slot];
}

static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

/* Return the number of output pixels of an axis, rounded up to whole strips. */
static int padded_count(const Axis *axis) { return (axis->count + STRIP - 1) / STRIP * STRIP; }

/* Return the first input pixel under the filter of output pixel `at`, and set `count` to the number of input pixels
   under it. Round as Pillow does. */
static INLINE int filter_range(const Filter *filter, int at, int *count) {
    const double center = (at + 0.5) * filter->scale;
    const int first = max_int((int)(center - filter->support + 0.5), 0);
    *count = min_int((int)(center + filter->support + 0.5), filter->in) - first;
    return first;
}

/* Compute the weights of STRIP output pixels (`at`, `at + step`, ...), `taps` for each, as Pillow does: in [0, 1] with
   sum 1, then rounded. Write the weights of the first `kept` pixels only. `scratch`: STRIP times `taps` numbers. */
static INLINE void set_weights(const Filter *filter, int at, int step, const int *first, const int *n, int taps,
                               int kept, double *scratch, int32_t *weights) {
    double center[STRIP], sum[STRIP];
    for (int s = 0; s < STRIP; s++) center[s] = (at + s * step + 0.5) * filter->scale, sum[s] = 0;
    for (int t = 0; t < taps; t++)
        for (int s = 0; s < STRIP; s++) {
            const double distance = (t + first[s] - center[s] + 0.5) * filter->inverse;
            const double away = distance < 0 ? -distance : distance, weight = away < 1 ? 1 - away : 0;
            sum[s] += scratch[t * STRIP + s] = t < n[s] ? weight : 0;
        }
    for (int s = 0; s < STRIP; s++) sum[s] = sum[s] != 0 ? sum[s] : 1;
    for (int t = 0; t < taps; t++) {
        int32_t rounded[STRIP];
        for (int s = 0; s < STRIP; s++)
            rounded[s] = (int32_t)(0.5 + scratch[t * STRIP + s] / sum[s] * (1 << WEIGHT_BITS));
        for (int s = 0; s < kept; s++) weights[(size_t)s * taps + t] = rounded[s];
    }
}

static void set_weights_plain(const Filter *filter, int at, int step, const int *first, const int *n, int taps,
                              int kept, double *scratch, int32_t *weights) {
    set_weights(filter, at, step, first, n, taps, kept, scratch, weights);
}

/* Plan the resizing of `in` pixels, from `offset` on, to `out` pixels; the window begins at `start`. `even`: use an
   even number of weights per pixel. */
static void plan_axis(Job *job, Axis *axis, int slot, int offset, int in, int out, int start, int flip, int even) {
    const int size = job->view->size, low = max_int(start, 0), high = min_int(start + size, out);
    const double scale = (double)in / out, support = scale > 1 ? scale : 1;
    const Filter filter = {in, scale, support, 1 / support};
    const int at = flip ? high - 1 : low, step = flip ? -1 : 1;
    axis->count = max_int(high - low, 0);
    axis->from = flip ? size - (high - start) : low - start;
    if (!axis->count) return;
    /* Pad the last strip with copies of the last output pixel: store `first` for each copy, but no weights. */
    const int room = padded_count(axis);
    int *first = axis->first = allocate(job, slot, room, sizeof(int)), *n = allocate(job, 4, room, sizeof(int));
    int most = 0;
    for (int i = 0; i < room; i++) {
        first[i] = filter_range(&filter, at + step * min_int(i, axis->count - 1), n + i);
        most = max_int(most, n[i]);
    }
    if (most > MAX_TAPS) fail(job, REFUSED);
    const int left = flip ? axis->count - 1 : 0, right = axis->count - 1 - left;
    axis->begin = offset + first[left], axis->end = offset + first[right] + n[right];
    axis->taps = even ? (most + 1) / 2 * 2 : most;
    axis->weights = allocate(job, slot + 1, (size_t)axis->count * axis->taps, sizeof(int32_t));
    double *scratch = allocate(job, 5, (size_t)STRIP * axis->taps, sizeof(double));
    for (int i = 0; i < axis->count; i += STRIP)
        job->set_weights(&filter, at + step * i, step, first + i, n + i, axis->taps, min_int(STRIP, axis->count - i),
                         scratch, axis->weights + (size_t)i * axis->taps);
    for (int i = 0; i < room; i++) first[i] += offset;
    for (int i = 4; i < 6; i++) free(job->memory[i]), job->memory[i] = NULL;
}

/* Resize `count` rows of 4-byte pixels to 3-byte pixels of the window. */
static void resize_across(const Axis *axis, int count, const uint8_t *const *rows, uint8_t *const *results) {
    for (int row = 0; row < count; row++) {
        const int32_t *weights = axis->weights;
        uint8_t *to = results[row];
        for (int i = 0; i < axis->count; i++, weights += axis->taps, to += 3) {
            const uint8_t *from = rows[row] + 4 * (size_t)axis->first[i];
            int32_t red = HALF, green = HALF, blue = HALF;
            for (int t = 0; t < axis->taps; t++, from += 4)
                red += from[0] * weights[t], green += from[1] * weights[t], blue += from[2] * weights[t];
            to[0] = red >> WEIGHT_BITS, to[1] = green >> WEIGHT_BITS, to[2] = blue >> WEIGHT_BITS;
        }
    }
}

/* Compute one output row as the weighted sum of rows of `count` bytes. */
static void resize_down(const uint8_t *const *rows, const int32_t *weights, int taps, int count, uint8_t *to) {
    for (int i = 0; i < count; i += BLOCK) {
        int32_t sums[BLOCK];
        const int columns = min_int(BLOCK, count - i);
        for (int c = 0; c < BLOCK; c++) sums[c] = HALF;
        for (int t = 0; t < taps; t++) {
            const uint8_t *row = rows[t] + i;
            for (int c = 0; c < BLOCK; c++) sums[c] += row[c] * weights[t];
        }
        for (int c = 0; c < columns; c++) to[i + c] = sums[c] >> WEIGHT_BITS;
    }
}

#ifdef HAVE_AVX2
/* The same functions with vectors of 16-bit numbers. A weight is split: 2048 times its upper part, plus its lower 11
   bits. Overflows in the two sums of products cancel in their total. */
#define LOWER_BITS 11
#define LOWER ((1 << LOWER_BITS) - 1)
/* Pack 16-bit weights of two adjacent pixels into 32 bits. */
static inline int32_t pack_pair(int32_t first, int32_t second) { return first | (int32_t)((uint32_t)second << 16); }

AVX2 static void set_weights_avx2(const Filter *filter, int at, int step, const int *first, const int *n, int taps,
                                  int kept, double *scratch, int32_t *weights) {
    set_weights(filter, at, step, first, n, taps, kept, scratch, weights);
}

/* Store one vector for each group of output pixels and each pair of weights. For each of the four pixels in turn,
   the vector has the upper parts of the two weights, then their lower parts. */
static void spread_weights(Job *job, Axis *axis, int slot) {
    const int groups = (axis->count + GROUP - 1) / GROUP, pairs = axis->taps / 2;
    int32_t *to = axis->spread = allocate(job, slot, (size_t)groups * pairs * 2 * GROUP, sizeof(int32_t));
    for (int g = 0; g < groups; g++)
        for (int pair = 0; pair < pairs; pair++)
            for (int i = g * GROUP; i < (g + 1) * GROUP; i++, to += 2) {
                const int32_t *weights = axis->weights + (size_t)i * axis->taps + 2 * pair;
                const int32_t a = i < axis->count ? weights[0] : 0, b = i < axis->count ? weights[1] : 0;
                to[0] = pack_pair(a >> LOWER_BITS, b >> LOWER_BITS), to[1] = pack_pair(a & LOWER, b & LOWER);
            }
}

/* Combine the upper and lower sums of products into levels. The lower sums include half a level, for rounding. */
AVX2 static INLINE __m256i level(__m256i upper, __m256i lower) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(upper, LOWER_BITS), lower), WEIGHT_BITS);
}

/* Resize one or two rows (`count`) with the same weights. */
AVX2 static INLINE void across_in_pairs(const Axis *axis, int pairs, int count,
                                                                       const uint8_t *const *rows, uint8_t *const *to) {
    /* Shuffles: interleave the channels of two 4-channel pixels, widened to 16 bits; and keep 3 channels of 4. */
    const __m256i interleave = _mm256_set_epi8(-1, 7, -1, 3, -1, 6, -1, 2, -1, 5, -1, 1, -1, 4, -1, 0,  //
                                               -1, 7, -1, 3, -1, 6, -1, 2, -1, 5, -1, 1, -1, 4, -1, 0);
    const __m256i drop_fourth = _mm256_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 6, 5, 4, 2, 1, 0,  //
                                                -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 6, 5, 4, 2, 1, 0);
    const __m256i half = _mm256_set1_epi32(HALF);
    const __m256i zero = _mm256_setzero_si256();
    const int32_t *weights = axis->spread;
    const int *first = axis->first;
    for (int i = 0; i < axis->count; i += GROUP, first += GROUP) {
        /* Index 0: sums of the first and the third pixel of the group. Index 1: of the second and the fourth. */
        __m256i upper[ROWS][2] = {{zero, zero}, {zero, zero}}, lower[ROWS][2] = {{half, half}, {half, half}};
        for (int pair = 0; pair < pairs; pair++, weights += 2 * GROUP) {
            const __m256i all = _mm256_loadu_si256((const void *)weights);
            const __m256i above[2] = {_mm256_shuffle_epi32(all, 0x00), _mm256_shuffle_epi32(all, 0xAA)};
            const __m256i below[2] = {_mm256_shuffle_epi32(all, 0x55), _mm256_shuffle_epi32(all, 0xFF)};
            for (int row = 0; row < count; row++)
                for (int k = 0; k < 2; k++) {
                    const uint8_t *from = rows[row] + 8 * pair;
                    const __m128i one = _mm_loadu_si128((const void *)(from + 4 * (ptrdiff_t)first[k]));
                    const __m128i other = _mm_loadu_si128((const void *)(from + 4 * (ptrdiff_t)first[k + 2]));
                    __m256i pixels = _mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1);
                    pixels = _mm256_shuffle_epi8(pixels, interleave);
                    upper[row][k] = _mm256_add_epi32(upper[row][k], _mm256_madd_epi16(pixels, above[k]));
                    lower[row][k] = _mm256_add_epi32(lower[row][k], _mm256_madd_epi16(pixels, below[k]));
                }
        }
        for (int row = 0; row < count; row++) {
            const __m256i evens = level(upper[row][0], lower[row][0]), odds = level(upper[row][1], lower[row][1]);
            const __m256i words = _mm256_packs_epi32(evens, odds);
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(words, words), drop_fourth);
            /* Each store writes 8 bytes. The last two are overwritten by the next pixels, or lie in the row's slack. */
            _mm_storel_epi64((void *)(to[row] + 3 * (ptrdiff_t)i), _mm256_castsi256_si128(bytes));
            _mm_storel_epi64((void *)(to[row] + 3 * (ptrdiff_t)i + 6), _mm256_extracti128_si256(bytes, 1));
        }
    }
}

AVX2 static void resize_across_avx2(const Axis *axis, int count, const uint8_t *const *rows, uint8_t *const *to) {
    const int pairs = axis->taps / 2;
    if (count == 2 && pairs == 1) across_in_pairs(axis, 1, 2, rows, to);
    else if (count == 2 && pairs == 2) across_in_pairs(axis, 2, 2, rows, to);
    else if (count == 2) across_in_pairs(axis, pairs, 2, rows, to);
    else across_in_pairs(axis, pairs, 1, rows, to);
}

AVX2 static INLINE void down_in_pairs(const uint8_t *const *rows, const int32_t *weights,
                                                                     int taps, int pairs, int count, uint8_t *to) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(HALF);
    for (int i = 0; i < count; i += BLOCK) {
        __m256i upper[4] = {zero, zero, zero, zero}, lower[4] = {half, half, half, half};
        for (int pair = 0; pair < pairs; pair++) {
            /* If the number of rows is odd, the last one is paired with itself at weight 0. */
            const int t = 2 * pair, next = t + 1 < taps ? t + 1 : t;
            const int32_t a = weights[t], b = next > t ? weights[next] : 0;
            const __m256i above = _mm256_set1_epi32(pack_pair(a >> LOWER_BITS, b >> LOWER_BITS));
            const __m256i below = _mm256_set1_epi32(pack_pair(a & LOWER, b & LOWER));
            const __m256i first = _mm256_loadu_si256((const void *)(rows[t] + i));
            const __m256i second = _mm256_loadu_si256((const void *)(rows[next] + i));
            const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
            const __m256i both[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                                     _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
            for (int k = 0; k < 4; k++) {
                upper[k] = _mm256_add_epi32(upper[k], _mm256_madd_epi16(both[k], above));
                lower[k] = _mm256_add_epi32(lower[k], _mm256_madd_epi16(both[k], below));
            }
        }
        const __m256i left = _mm256_packs_epi32(level(upper[0], lower[0]), level(upper[1], lower[1]));
        const __m256i right = _mm256_packs_epi32(level(upper[2], lower[2]), level(upper[3], lower[3]));
        const __m256i bytes = _mm256_packus_epi16(left, right);
        /* Prefetch the next output row, which has been evicted from the near caches. */
        _mm_prefetch((const void *)(to + i + count), _MM_HINT_T0);
        if (i + BLOCK <= count) {
            _mm256_storeu_si256((void *)(to + i), bytes);
        } else {
            uint8_t rest[BLOCK];
            _mm256_storeu_si256((void *)rest, bytes);
            memcpy(to + i, rest, count - i);
        }
    }
}

AVX2 static void resize_down_avx2(const uint8_t *const *rows, const int32_t *weights, int taps, int count, uint8_t *to) {
    if (taps == 2) down_in_pairs(rows, weights, 2, 1, count, to);
    else if (taps == 3) down_in_pairs(rows, weights, 3, 2, count, to);
    else if (taps == 4) down_in_pairs(rows, weights, 4, 2, count, to);
    else down_in_pairs(rows, weights, taps, (taps + 1) / 2, count, to);
}
#endif

/* Return 1 for the kinds of JPEG whose partial decodes the tests compare with full ones. Pillow decodes the others. */
static int is_supported(const struct jpeg_decompress_struct *jpeg) {
    if (jpeg->data_precision != 8 || jpeg->arith_code) return 0;
    const jpeg_component_info *c = jpeg->comp_info;
    const int whole = c[0].h_samp_factor == 1 && c[0].v_samp_factor == 1;
    if (jpeg->num_components == 1) return jpeg->jpeg_color_space == JCS_GRAYSCALE && whole;
    if (jpeg->num_components != 3) return 0;
    for (int i = 1; i < 3; i++)
        if (c[i].h_samp_factor != 1 || c[i].v_samp_factor != 1) return 0;
    if (jpeg->jpeg_color_space == JCS_RGB) return whole;
    return jpeg->jpeg_color_space == JCS_YCbCr && c[0].h_samp_factor <= 2 && c[0].v_samp_factor <= 2;
}

/* Return 0 for a progressive image that lacks some bits of its coefficients. libjpeg smooths such an image with the
   neighbors of each block, some of which are missing in a partial decode. */
static int is_complete(const struct jpeg_decompress_struct *jpeg) {
    if (!jpeg->progressive_mode || !jpeg->coef_bits) return 1;
    for (int c = 0; c < jpeg->num_components; c++)
        for (int i = 0; i < DCTSIZE2; i++)
            if (jpeg->coef_bits[c][i]) return 0;
    return 1;
}

/* Return 1 if the scan, whose last rows were not decoded, continues up to the end-of-image marker. This
   distinguishes a truncated file from a complete one without decoding the rest. */
static int reaches_end(struct jpeg_decompress_struct *jpeg) {
    /* libjpeg has read all scans before the first row. */
    if (jpeg_has_multiple_scans(jpeg)) return 1;
    int marker = jpeg->unread_marker;
    const uint8_t *at = jpeg->src->next_input_byte, *end = at + jpeg->src->bytes_in_buffer;
    while (marker == 0 || (marker >= JPEG_RST0 && marker <= JPEG_RST0 + 7)) {
        at = memchr(at, 0xFF, end - at);
        if (!at) return 0;
        while (at < end && *at == 0xFF) at++;
        if (at == end) return 0;
        marker = *at++;
    }
    return marker == JPEG_EOI;
}

static void read_header(Job *job) {
    struct jpeg_decompress_struct *jpeg = &job->jpeg;
    const View *view = job->view;
    jpeg_create_decompress(jpeg);
    jpeg->client_data = job;
    jpeg->mem->max_memory_to_use = MAX_MEMORY;
    jpeg_mem_src(jpeg, job->data, job->length);
    jpeg_read_header(jpeg, TRUE);
    if (jpeg->image_width != (JDIMENSION)view->width || jpeg->image_height != (JDIMENSION)view->height)
        fail(job, REFUSED);
    if ((uint64_t)jpeg->image_width * jpeg->image_height > MAX_PIXELS) fail(job, TOO_MUCH);
    if (!is_supported(jpeg)) fail(job, REFUSED);
    job->progress.progress_monitor = on_progress;
    jpeg->progress = &job->progress;
    jpeg->out_color_space = JCS_EXT_RGBX;
}

/* Restrict decoding to columns `begin` to `end` and a few around them. Return the first decoded column. Two more
   columns on each side contribute to the chroma of the requested ones. */
static int crop_columns(struct jpeg_decompress_struct *jpeg, int begin, int end) {
    const int width = (int)jpeg->output_width;
    begin = max_int(begin - 2, 0), end = min_int(end + 2, width);
    if (begin == 0 && end == width) return 0;
    JDIMENSION first = (JDIMENSION)begin, columns = (JDIMENSION)(end - begin);
    jpeg_crop_scanline(jpeg, &first, &columns);
    return (int)first;
}

/* Write output rows from row `at` on, until one needs input row `have` or a later one. Return the next output row.
   `kept` is a ring buffer of `slots` input rows, already resized across. */
static int write_rows(Job *job, const uint8_t *kept, size_t stride, int slots, int have, int at, const uint8_t **rows) {
    const Axis *down = &job->down, *across = &job->across;
    const View *view = job->view;
    for (; at < down->count; at++) {
        const int32_t *weights = down->weights + (size_t)at * down->taps;
        int taps = min_int(down->taps, down->end - down->first[at]);
        while (taps > 1 && !weights[taps - 1]) taps--;
        if (down->first[at] + taps > have) break;
        for (int t = 0; t < taps; t++) rows[t] = kept + (size_t)((down->first[at] + t) % slots) * stride;
        uint8_t *to = job->out + 3 * ((size_t)(down->from + at) * view->size + across->from);
        job->resize_down(rows, weights, taps, 3 * across->count, to);
    }
    return at;
}

static void decode(Job *job) {
    struct jpeg_decompress_struct *jpeg = &job->jpeg;
    const View *view = job->view;
    Axis *across = &job->across, *down = &job->down;
    read_header(job);
    plan_axis(job, across, 0, view->left, view->right - view->left, view->new_width, view->x, view->flip, 1);
    plan_axis(job, down, 2, view->top, view->bottom - view->top, view->new_height, view->y, 0, 0);
    jpeg_start_decompress(jpeg);
    if (!is_complete(jpeg)) fail(job, REFUSED);
    if (across->count && down->count) {
        const int first = crop_columns(jpeg, across->begin, across->end);
        for (int i = 0; i < padded_count(across); i++) across->first[i] -= first;
#ifdef HAVE_AVX2
        if (job->resize_across == resize_across_avx2) spread_weights(job, across, 5);
#endif
        /* Skip only from the first row, and an even number of rows: some versions of libjpeg-turbo fail otherwise. */
        JDIMENSION skipped = (JDIMENSION)(down->begin / 2 * 2);
        if (skipped && jpeg_skip_scanlines(jpeg, skipped) != skipped) fail(job, REFUSED);
        const int slots = down->taps + ROWS;
        const size_t stride = 3 * (size_t)across->count + SLACK;
        /* At the right edge, weights of 0 apply to bytes beyond the last pixel. */
        const size_t row_bytes = 4 * ((size_t)jpeg->output_width + (size_t)across->taps) + SLACK;
        const size_t pointers = sizeof(uint8_t *) * (size_t)slots;
        /* libjpeg-turbo bypasses the cache if it writes rows aligned to 32 bytes. An offset of 16 prevents that. */
        const size_t row_stride = (row_bytes + 31) / 32 * 32;
        uint8_t *memory = allocate(job, 4, 1, pointers + slots * stride + ROWS * row_stride + 64);
        const uint8_t **rows = (const uint8_t **)memory;
        uint8_t *kept = memory + pointers, *decoded = kept + slots * stride;
        decoded += 16 + (32 - (uintptr_t)decoded % 32);
        memset(decoded, 0, ROWS * row_stride);
        JSAMPROW lines[ROWS];
        for (int i = 0; i < ROWS; i++) lines[i] = decoded + i * row_stride;
        int at = 0;
        while (at < down->count) {
            const int row = (int)jpeg->output_scanline, read = (int)jpeg_read_scanlines(jpeg, lines, ROWS);
            if (read < 1) fail(job, DAMAGED);
            const int above = min_int(max_int(down->begin - row, 0), read);
            const uint8_t *from[ROWS];
            uint8_t *to[ROWS];
            for (int i = above; i < read; i++)
                from[i - above] = lines[i], to[i - above] = kept + (size_t)((row + i) % slots) * stride;
            if (above < read) job->resize_across(across, read - above, from, to);
            at = write_rows(job, kept, stride, slots, row + read, at, rows);
        }
    }
    if (!reaches_end(jpeg)) fail(job, CUT_SHORT);
}

/* Separate from decode_view, because longjmp would invalidate local variables of the function that calls setjmp. */
static int decode_or_fail(Job *job) {
    if (setjmp(job->back)) return job->code;
    decode(job);
    return OK;
}

/* Write the view of the image in `data` to `out`, uint8 (size, size, 3). Return OK, or an error code after filling
   `out` with zeros. The view must satisfy is_sane. */
static int decode_view(const uint8_t *data, size_t length, const View *view, uint8_t *out) {
    Job job;
    memset(&job, 0, sizeof job);
    job.data = data, job.length = length, job.view = view, job.out = out;
    job.jpeg.err = jpeg_std_error(&job.errors);
    job.jpeg.client_data = &job;
    job.errors.error_exit = on_error;
    job.errors.emit_message = on_message;
    job.errors.output_message = ignore_message;
    job.set_weights = set_weights_plain, job.resize_across = resize_across, job.resize_down = resize_down;
#ifdef HAVE_AVX2
    if (__builtin_cpu_supports("avx2"))
        job.set_weights = set_weights_avx2, job.resize_across = resize_across_avx2, job.resize_down = resize_down_avx2;
#endif
    const size_t bytes = 3 * (size_t)view->size * view->size;
    if (view->x < 0 || view->y < 0 || view->x + view->size > view->new_width || view->y + view->size > view->new_height)
        memset(out, 0, bytes);
    const int code = decode_or_fail(&job);
    jpeg_destroy_decompress(&job.jpeg);
    for (size_t i = 0; i < sizeof job.memory / sizeof *job.memory; i++) free(job.memory[i]);
    if (code != OK) memset(out, 0, bytes);
    return code;
}

/* Read width and height from the frame header of an 8-bit Huffman-coded JPEG; return 0 without such
   a header. */
static int frame_size(const uint8_t *data, size_t length, int *width, int *height) {
    if (length < 4 || data[0] != 0xFF || data[1] != 0xD8) return 0;
    size_t at = 2;
    while (at + 10 <= length) {
        if (data[at] != 0xFF) return 0;
        const int marker = data[at + 1];
        if (marker == 0xFF) {
            at++;
            continue;
        }
        if (marker >= 0xC0 && marker <= 0xC2) {
            *height = data[at + 5] << 8 | data[at + 6], *width = data[at + 7] << 8 | data[at + 8];
            return data[at + 4] == 8 && *width > 0 && *height > 0;
        }
        /* Skip tables, application data and comments. All other segments follow the frame header or are unknown. */
        if (marker != 0xC4 && marker != 0xDB && marker != 0xDD && marker != 0xFE && (marker < 0xE0 || marker > 0xEF))
            return 0;
        at += 2 + (size_t)(data[at + 2] << 8 | data[at + 3]);
    }
    return 0;
}

static int is_sane(const View *v) {
    const int most = 1 << 28;
    return 0 <= v->left && v->left < v->right && v->right <= v->width && 0 <= v->top && v->top < v->bottom &&
           v->bottom <= v->height && 0 < v->new_width && v->new_width < INT_MAX - most && 0 < v->new_height &&
           v->new_height < INT_MAX - most && -most < v->x && v->x < INT_MAX - most && -most < v->y &&
           v->y < INT_MAX - most && 0 < v->size && v->size <= 65535;
}

#ifndef LARS_WITHOUT_PYTHON

/* Return the data of a bytes object, or of `length` bytes at an address. */
static const uint8_t *bytes_at(PyObject *given, PyObject *length, size_t *count) {
    *count = PyLong_AsSize_t(length);
    if (PyErr_Occurred()) return NULL;
    if (!PyBytes_Check(given)) return PyLong_AsVoidPtr(given);
    if (*count == (size_t)PyBytes_Size(given)) return (const uint8_t *)PyBytes_AsString(given);
    PyErr_SetString(PyExc_ValueError, "the length does not match the bytes object");
    return NULL;
}

static int check_count(const char *name, Py_ssize_t given, Py_ssize_t takes) {
    if (given != takes) PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, takes, given);
    return given == takes;
}

static PyObject *size_of(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    if (!check_count("size", given, 2)) return NULL;
    size_t length;
    const uint8_t *data = bytes_at(args[0], args[1], &length);
    if (PyErr_Occurred()) return NULL;
    int width = 0, height = 0;
    if (!frame_size(data, length, &width, &height)) Py_RETURN_NONE;
    return Py_BuildValue("ii", width, height);
}

static PyObject *decoded(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    (void)self;
    if (!check_count("decode", given, 15)) return NULL;
    size_t length;
    const uint8_t *data = bytes_at(args[0], args[1], &length);
    uint8_t *out = PyLong_AsVoidPtr(args[2]);
    int numbers[12];
    for (int i = 0; i < 12 && !PyErr_Occurred(); i++) {
        const long number = PyLong_AsLong(args[3 + i]);
        if (number < INT_MIN || number > INT_MAX) PyErr_SetString(PyExc_OverflowError, "an argument is not an int");
        numbers[i] = (int)number;
    }
    if (PyErr_Occurred()) return NULL;
    View view;
    memcpy(&view, numbers, sizeof view);
    if (!out || !is_sane(&view)) {
        PyErr_SetString(PyExc_ValueError, "the view is invalid, or its box does not lie in the image");
        return NULL;
    }
    PyThreadState *others = PyEval_SaveThread();
    const int code = decode_view(data, length, &view, out);
    PyEval_RestoreThread(others);
    return PyLong_FromLong(code);
}

static PyMethodDef methods[] = {
    {"size", (PyCFunction)(void (*)(void))size_of, METH_FASTCALL,
     "size(data, length): return (width, height) from the frame header, or None. data: bytes, or an address."},
    {"decode", (PyCFunction)(void (*)(void))decoded, METH_FASTCALL,
     "decode(data, length, out, width, height, left, top, right, bottom, new_width, new_height, x, y, flip, size):\n"
     "write uint8 (size, size, 3) to the address `out` and return 0; or write zeros and return another number. The\n"
     "arguments are the image's size, the crop box, its new size, the window's corner, flip, and the window's side."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "jpeg", "Decode views of JPEGs with libjpeg-turbo.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_jpeg(void) {
    return PyModuleDef_Init(&module);
}
#endif
