/* Feeds mutated JPEGs and random views to lars_train/data/decode/jpeg.c; scripts/verify/fuzz_jpeg.py builds it with sanitizers.

   fuzz_jpeg SEEDS COUNT SECONDS START OUT: SEEDS holds each seed with its length (4 bytes, little-endian) before it.
   The same START gives the same inputs. After a finding, OUT has the input. */

#include <time.h>
#include <unistd.h>

#define LARS_WITHOUT_PYTHON
#include "../../lars_train/data/decode/jpeg.c"

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

#define MOST_SEEDS 4096
#define LONGEST (1 << 18)
/* Larger images are slow, and are decoded rarely. */
#define USUAL_PIXELS (1 << 19)
#define USUAL_SIDE 48

static uint64_t state;
static const uint8_t *seeds[MOST_SEEDS];
static size_t lengths[MOST_SEEDS];
static int seed_count;
static uint8_t input[LONGEST];
static size_t input_length;
static const char *input_path;

static uint64_t draw(uint64_t below) {
    /* Marsaglia's xorshift64, Journal of Statistical Software 8 (14), 2003. */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return below ? state % below : 0;
}

static void save_input(void) {
    FILE *file = fopen(input_path, "wb");
    if (!file) return;
    fwrite(input, 1, input_length, file);
    fclose(file);
}

static void remove_piece(size_t at, size_t length) {
    memmove(input + at, input + at + length, input_length - at - length);
    input_length -= length;
}

static void insert_piece(size_t at, const uint8_t *piece, size_t length) {
    if (input_length + length > LONGEST) return;
    memmove(input + at + length, input + at, input_length - at);
    memcpy(input + at, piece, length);
    input_length += length;
}

/* The position of a marker after a random start, or 0 if there is none. */
static size_t some_marker(void) {
    size_t at = draw(input_length);
    for (size_t i = 0; i + 1 < input_length; i++, at++) {
        if (at + 1 >= input_length) at = 0;
        if (input[at] == 0xFF && input[at + 1] != 0 && input[at + 1] != 0xFF) return at;
    }
    return 0;
}

static void edit_marker(void) {
    static const uint8_t kinds[] = {0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCA, 0xCC, 0xD0, 0xD3, 0xD7, 0xD8,
                                    0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE, 0x01, 0x00, 0xFF};
    const size_t at = some_marker();
    if (at + 20 >= input_length) return;
    switch (draw(4)) {
    case 0: input[at + 1] = kinds[draw(sizeof kinds)]; break;
    case 1: input[at + 2 + draw(2)] = (uint8_t)draw(256); break;
    /* Change the segment's length by at most 4. */
    case 2: input[at + 3] += (uint8_t)(draw(9) - 4); break;
    default: input[at + 4 + draw(16)] = draw(2) ? (uint8_t)draw(256) : (uint8_t)draw(4);
    }
}

/* Change the size, sampling factors or number of components. */
static void edit_frame(void) {
    for (size_t at = 0; at + 19 < input_length; at++) {
        if (input[at] != 0xFF || input[at + 1] < 0xC0 || input[at + 1] > 0xC2) continue;
        static const uint8_t sampling[] = {0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x44, 0x31, 0x00, 0xFF};
        switch (draw(4)) {
        case 0: input[at + 5 + draw(4)] = (uint8_t)draw(256); break;
        case 1: input[at + 6 + 2 * draw(2)] = (uint8_t)draw(40); break;
        case 2: input[at + 11 + 3 * draw(3)] = sampling[draw(sizeof sampling)]; break;
        default: input[at + 9] = (uint8_t)draw(6);
        }
        return;
    }
}

static void mutate(void) {
    if (input_length < 4) return;
    const size_t at = draw(input_length), length = 1 + draw(draw(4) ? 16 : input_length);
    switch (draw(10)) {
    case 0: input[at] ^= (uint8_t)(1 << draw(8)); break;
    case 1: input[at] = (uint8_t)draw(256); break;
    case 2: input_length = at; break;
    case 3: remove_piece(at, length < input_length - at ? length : input_length - at); break;
    case 4: {
        const int other = (int)draw(seed_count);
        const size_t from = draw(lengths[other]), rest = lengths[other] - from;
        insert_piece(at, seeds[other] + from, length < rest ? length : rest);
        break;
    }
    case 5: {
        const int other = (int)draw(seed_count);
        if (at < lengths[other]) input_length = at, insert_piece(at, seeds[other] + at, lengths[other] - at);
        break;
    }
    case 6:
    case 7: edit_marker(); break;
    case 8: edit_frame(); break;
    default:
        for (size_t i = at; i < at + length && i < input_length; i++) input[i] = (uint8_t)(draw(3) ? 0xFF : draw(256));
    }
}

static void between(int most, int *low, int *high) {
    const int a = (int)draw(most), b = (int)draw(most);
    *low = a < b ? a : b, *high = (a < b ? b : a) + 1;
}

static View some_view(int width, int height) {
    View view = {.width = width, .height = height, .flip = (int)draw(2), .size = 1 + (int)draw(USUAL_SIDE)};
    between(width, &view.left, &view.right);
    between(height, &view.top, &view.bottom);
    if (draw(4) == 0) view.left = view.top = 0, view.right = width, view.bottom = height;
    view.new_width = 1 + (int)draw(draw(8) ? 2 * USUAL_SIDE : 1000);
    view.new_height = 1 + (int)draw(draw(8) ? 2 * USUAL_SIDE : 1000);
    view.x = (int)draw(view.new_width + 8) - 4, view.y = (int)draw(view.new_height + 8) - 4;
    if (draw(2)) view.new_width = view.new_height = view.size, view.x = view.y = 0;
    /* Strong reduction: hundreds of weights per pixel. */
    if (draw(8) == 0) view.new_width = 1 + (int)draw(4), view.new_height = 1 + (int)draw(4), view.x = view.y = 0;
    return view;
}

/* Decode once, in buffers of exact size, so that the sanitizer detects every access outside. */
static int decode_once(void) {
    int width = 1 + (int)draw(64), height = 1 + (int)draw(64);
    uint8_t *data = malloc(input_length ? input_length : 1);
    memcpy(data, input, input_length);
    const int found = frame_size(data, input_length, &width, &height);
    if (!found) width = height = 16;
    const View view = some_view(width, height);
    int code = -1;
    if ((int64_t)width * height <= USUAL_PIXELS || draw(1000) == 0) {
        if (!is_sane(&view)) abort();
        uint8_t *out = malloc(3 * (size_t)view.size * view.size);
        code = decode_view(data, input_length, &view, out);
        free(out);
    }
    free(data);
    return code;
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    FILE *file = fopen(argv[1], "rb");
    if (!file) return 2;
    uint8_t head[4];
    while (seed_count < MOST_SEEDS && fread(head, 1, 4, file) == 4) {
        const size_t length = head[0] | head[1] << 8 | head[2] << 16 | (size_t)head[3] << 24;
        uint8_t *seed = malloc(length);
        if (length > LONGEST || fread(seed, 1, length, file) != length) return 2;
        seeds[seed_count] = seed, lengths[seed_count++] = length;
    }
    fclose(file);
    const long count = atol(argv[2]), seconds = atol(argv[3]);
    state = (uint64_t)atol(argv[4]) * 0x9E3779B97F4A7C15u + 1;
    input_path = argv[5];
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(save_input);
    const time_t end = time(NULL) + seconds;
    long done = 0, outcomes[6] = {0};
    for (; done < count && (done % 256 || time(NULL) < end); done++) {
        const int seed = (int)draw(seed_count);
        memcpy(input, seeds[seed], lengths[seed]);
        input_length = lengths[seed];
        for (uint64_t times = draw(16) ? 1 + draw(4) : 0; times; times--) mutate();
        /* An input that takes a minute is a finding, too. */
        alarm(60);
        outcomes[1 + decode_once()]++;
    }
    for (int i = 0; i < seed_count; i++) free((void *)seeds[i]);
    printf("%ld inputs: %ld decoded, %ld refused, %ld damaged, %ld cut short, %ld over a limit, %ld not tried\n", done,
           outcomes[1], outcomes[2], outcomes[3], outcomes[4], outcomes[5], outcomes[0]);
    return 0;
}
