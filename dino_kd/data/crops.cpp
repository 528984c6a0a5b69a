// The crops of many images in one call: cut, antialiased resize, flip, colour, blur, solarize.
//
// Results follow Pillow's, operation by operation, with its rounding to 8 bits after each one; what
// differs is single precision where Pillow counts in integers or doubles. Images are RGB,
// interleaved; crops are planar. `native.py` compiles this file and fills in the structures.
//
// How it gets its speed, almost without intrinsics (GCC's and Clang's vector types, and plain loops
// that compilers turn into vector code):
// * The horizontal pass of the resize works on 8 or 16 image rows at once, one per vector lane,
//   after turning square blocks of bytes around. So every tap is one multiply-add, whatever the scale.
// * A flip only reverses the order in which the filter's places are listed.
// * Colour is done in pieces of 256 pixels that stay in the first-level cache: bytes are turned
//   into floats once for all operations between two that need the whole picture.
// * Memory is kept per thread and reused; nothing is allocated for the second image.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// As many floats as a register of the processor holds: wider vectors compile into slow code.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Words __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct Image {
    const uint8_t* pixels;  // [height, width, 3]
    int64_t height, width;
    int64_t slot;  // place in the batch
};

enum Change : int32_t { NONE, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE };

struct Crop {
    int32_t top, left, height, width;  // the box in the image
    int32_t flip_horizontal, flip_vertical;
    int32_t changes[4];  // of colour, in this order
    float brightness, contrast, saturation;
    int32_t hue;  // steps of 1/256 of the circle, as Pillow's 8-bit hue counts
    int32_t grayscale;
    float sigma;  // of the blur in pixels; 0: none
    int32_t solarize;
};

struct Recipe {
    int64_t global_crops, local_crops, batch;
    int64_t global_height, global_width, local_height, local_width;
    int64_t cubic;  // else the triangle filter
    int64_t solarize_threshold;
};

int padded(int64_t n) { return int(n + LANES - 1) / LANES * LANES; }

Bytes load(const uint8_t* from) {
    Bytes v;
    memcpy(&v, from, sizeof v);
    return v;
}

void store(uint8_t* to, Bytes v) { memcpy(to, &v, sizeof v); }

// Step by step: compilers take a conversion to four times the width apart, byte by byte.
inline Floats to_floats(Bytes v) {
#ifdef __AVX512F__
    return Floats(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(__m128i(v))));
#elif defined(__AVX2__)
    long long packed;
    memcpy(&packed, &v, sizeof packed);
    return Floats(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(packed))));
#else
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, Words), Ints),
                                   Floats);
#endif
}

// To the nearest level, halves upward, as Pillow's resize rounds.
Bytes to_bytes(Floats v) {
    v += 0.5f;
    v = v > 0.0f ? v : Floats{};
    v = v < 255.5f ? v : Floats{} + 255.5f;
    Ints levels = __builtin_convertvector(v, Ints);
#ifdef __AVX512F__
    return Bytes(_mm512_cvtepi32_epi8(__m512i(levels)));
#elif defined(__AVX2__)
    __m256i wide = __m256i(levels);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    long long packed = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    Bytes narrow;
    memcpy(&narrow, &packed, sizeof narrow);
    return narrow;
#else
    return __builtin_convertvector(__builtin_convertvector(levels, Words), Bytes);
#endif
}

// ---------------------------------------------------------------------------------------- resize

#if defined(__clang__) || __GNUC__ >= 12
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif

// Turn a square block of bytes around. Dealing two halves of the pack together, like cards, once
// for each power of two in its side brings byte (i, j) to (j, i).
inline void transpose(Bytes* v) {
    Bytes w[LANES];
    constexpr int half = LANES / 2;
    for (int round = 1; round < LANES; round *= 2) {
        for (int i = 0; i < half; i++) {
            const Bytes a = v[i], b = v[i + half];
#ifdef __AVX512F__
            w[2 * i] = ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            w[2 * i + 1] = ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
            w[2 * i] = ZIP(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            w[2 * i + 1] = ZIP(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
        }
        for (int i = 0; i < LANES; i++) v[i] = w[i];
    }
}

// Which pixels make each output pixel along one axis, and how much of each.
struct Axis {
    int taps = 0;
    std::vector<int> start;     // [out], first pixel used
    std::vector<float> weight;  // [taps][out]
    std::vector<double> center, sum;

    // Pillow's filters: bicubic (a = -0.5) or triangle, widened by the scale when shrinking, and
    // scaled to a sum of 1 where the picture's edge cuts them off.
    void plan(int in, int out, bool flip, bool cubic) {
        double scale = double(in) / out, widen = std::max(scale, 1.0), inverse = 1 / widen;
        double support = (cubic ? 2 : 1) * widen;
        taps = std::min(in, int(std::ceil(2 * support)));
        start.resize(out), center.resize(out), sum.assign(out, 0), weight.resize(taps * out);
        for (int i = 0; i < out; i++) {
            center[i] = ((flip ? out - 1 - i : i) + 0.5) * scale;
            start[i] = std::min(std::max(int(center[i] - support + 0.5), 0), in - taps);
        }
        for (int k = 0; k < taps; k++) {
            float* w = &weight[k * out];
            for (int i = 0; i < out; i++) {
                double d = std::fabs((start[i] + k + 0.5 - center[i]) * inverse);
                double near = (1.5 * d - 2.5) * d * d + 1;
                double far = ((2.5 - 0.5 * d) * d - 4) * d + 2;
                double curve = d < 1 ? near : d < 2 ? far : 0;
                double tent = d < 1 ? 1 - d : 0;
                double value = cubic ? curve : tent;
                w[i] = float(value);
                sum[i] += value;
            }
        }
        for (int i = 0; i < out; i++) sum[i] = 1 / sum[i];
        for (int k = 0; k < taps; k++)
            for (int i = 0; i < out; i++) weight[k * out + i] *= float(sum[i]);
    }
};

struct Scratch {
    Axis across, down;
    std::vector<Floats> columns;          // [3 * box width] of LANES rows each
    std::vector<Bytes> turned;            // [3][padded width] of LANES rows each
    std::vector<uint8_t> narrow;          // [3][padded box height][padded width]
    std::vector<Floats> strip, other;     // of the blur
    std::vector<float> line, next;        // of the blur
};

// LANES rows of the box (the last one repeated), as one vector of floats for each byte of a row.
void read_rows(const uint8_t* const* rows, int bytes, Floats* columns) {
    for (int j = 0; j < bytes; j += LANES) {
        Bytes block[LANES];
        int left = std::min(bytes - j, LANES);
        for (int i = 0; i < LANES; i++) {
            if (left == LANES) {
                block[i] = load(rows[i] + j);
            } else {  // never read beyond the image
                block[i] = Bytes{};
                memcpy(&block[i], rows[i] + j, left);
            }
        }
        transpose(block);
        for (int i = 0; i < LANES; i++) columns[j + i] = to_floats(block[i]);
    }
}

void filter_across(const Axis& axis, int out, const Floats* columns, Bytes* turned, int stride) {
    for (int x = 0; x < out; x++) {
        const Floats* from = columns + 3 * axis.start[x];
        const float* weight = &axis.weight[x];
        Floats red{}, green{}, blue{};
        for (int k = 0; k < axis.taps; k++, from += 3, weight += out) {
            red += *weight * from[0];
            green += *weight * from[1];
            blue += *weight * from[2];
        }
        turned[x] = to_bytes(red);
        turned[stride + x] = to_bytes(green);
        turned[2 * stride + x] = to_bytes(blue);
    }
}

void filter_down(const Axis& axis, int out, int width, const uint8_t* narrow, int stride,
                 uint8_t* to) {
    for (int y = 0; y < out; y++, to += width) {
        const uint8_t* rows = narrow + int64_t(axis.start[y]) * stride;
        for (int x = 0; x < width; x += LANES) {
            Floats sum{};
            for (int k = 0; k < axis.taps; k++)
                sum += axis.weight[k * out + y] * to_floats(load(rows + k * stride + x));
            Bytes levels = to_bytes(sum);
            memcpy(to + x, &levels, std::min(width - x, LANES));
        }
    }
}

// The box of an image as planes [3, height, width]; first across, then down, as Pillow before 13, which
// turns that round for boxes that shrink far more in height than in width.
void resize(const Image& image, const Crop& crop, int height, int width, bool cubic, Scratch& s,
            uint8_t* to) {
    int stride = padded(width), bytes = 3 * crop.width;
    int64_t plane = int64_t(padded(crop.height)) * stride;
    s.across.plan(crop.width, width, crop.flip_horizontal, cubic);
    s.down.plan(crop.height, height, crop.flip_vertical, cubic);
    s.columns.resize(padded(bytes));
    s.turned.resize(3 * stride);
    if (int64_t(s.narrow.size()) < 3 * plane) s.narrow.resize(3 * plane);
    const uint8_t* corner = image.pixels + 3 * (crop.top * image.width + crop.left);
    for (int y = 0; y < crop.height; y += LANES) {
        const uint8_t* rows[LANES];
        for (int i = 0; i < LANES; i++)
            rows[i] = corner + 3 * image.width * std::min(y + i, crop.height - 1);
        read_rows(rows, bytes, s.columns.data());
        filter_across(s.across, width, s.columns.data(), s.turned.data(), stride);
        for (int x = 0; x < 3 * stride; x += LANES) {
            Bytes* block = &s.turned[x];
            transpose(block);
            uint8_t* corner_to = &s.narrow[x / stride * plane + int64_t(y) * stride + x % stride];
            for (int i = 0; i < LANES; i++) store(corner_to + i * stride, block[i]);
        }
    }
    for (int band = 0; band < 3; band++)
        filter_down(s.down, height, width, &s.narrow[band * plane], stride,
                    to + int64_t(band) * height * width);
}

// ---------------------------------------------------------------------------------------- colour

constexpr int PIECE = 256;  // pixels: three bands of floats are 3 KiB

struct Piece {
    alignas(64) float red[PIECE], green[PIECE], blue[PIECE];
};

// Cut off and drop the fraction, as Pillow's blend does.
inline float level(float v) {
    v = v > 0.0f ? v : 0.0f;
    return std::floor(v < 255.0f ? v : 255.0f);
}

// Pillow's grey, in 16 bits of fraction; every number here is exact in single precision.
inline float luma(float red, float green, float blue) {
    return std::floor((19595.0f * red + 38470.0f * green + 7471.0f * blue + 32768.0f) / 65536.0f);
}

void brightness(Piece& p, float factor) {
    for (int i = 0; i < PIECE; i++) {
        p.red[i] = level(factor * p.red[i]);
        p.green[i] = level(factor * p.green[i]);
        p.blue[i] = level(factor * p.blue[i]);
    }
}

void contrast(Piece& p, float factor, float mean) {
    for (int i = 0; i < PIECE; i++) {
        p.red[i] = level(mean + factor * (p.red[i] - mean));
        p.green[i] = level(mean + factor * (p.green[i] - mean));
        p.blue[i] = level(mean + factor * (p.blue[i] - mean));
    }
}

void saturation(Piece& p, float factor) {
    for (int i = 0; i < PIECE; i++) {
        float grey = luma(p.red[i], p.green[i], p.blue[i]);
        p.red[i] = level(grey + factor * (p.red[i] - grey));
        p.green[i] = level(grey + factor * (p.green[i] - grey));
        p.blue[i] = level(grey + factor * (p.blue[i] - grey));
    }
}

void gray(Piece& p) {
    for (int i = 0; i < PIECE; i++)
        p.red[i] = p.green[i] = p.blue[i] = luma(p.red[i], p.green[i], p.blue[i]);
}

void solarize(Piece& p, float threshold) {
    for (float* band : {p.red, p.green, p.blue})
        for (int i = 0; i < PIECE; i++)
            band[i] = band[i] < threshold ? band[i] : 255.0f - band[i];
}

inline float unit(float v) {
    v = v > 0.0f ? v : 0.0f;
    return v < 1.0f ? v : 1.0f;
}

// To hue, saturation and value in 8 bits each and back, as Pillow's HSV mode. The way back is the
// usual table of six sectors, written as one tent for each band.
void hue(Piece& p, float steps) {
    for (int i = 0; i < PIECE; i++) {
        float red = p.red[i], green = p.green[i], blue = p.blue[i];
        float most = red > green ? red : green, least = red < green ? red : green;
        most = most > blue ? most : blue;
        least = least < blue ? least : blue;
        float range = most - least, some = range > 0 ? range : 1.0f;
        float if_red = (green - blue) / some;
        float if_green = 2.0f + (blue - red) / some;
        float if_blue = 4.0f + (red - green) / some;
        float turn = red == most ? if_red : green == most ? if_green : if_blue;
        turn *= 1.0f / 6;
        turn = turn < 0 ? turn + 1.0f : turn;
        float h = range > 0 ? std::floor(turn * 255.0f) : 0.0f;
        h += steps;  // steps are 0..255
        h = h >= 256.0f ? h - 256.0f : h;
        float s = std::floor(255.0f * (range / (most > 0 ? most : 1.0f)));
        float sector = h * (6.0f / 255.0f);  // 0..6, and the tents of 6 are those of 0
        float drop = most * s * (1.0f / 255.0f);
        p.red[i] = std::floor(most - drop * unit(2.0f - std::fabs(sector - 3.0f)) + 0.5f);
        p.green[i] = std::floor(most - drop * unit(std::fabs(sector - 2.0f) - 1.0f) + 0.5f);
        p.blue[i] = std::floor(most - drop * unit(std::fabs(sector - 4.0f) - 1.0f) + 0.5f);
    }
}

void get(const uint8_t* from, float* to, int count) {
    for (int i = 0; i < count; i++) to[i] = from[i];
}

void put(const float* from, uint8_t* to, int count) {
    for (int i = 0; i < count; i++) to[i] = uint8_t(int(from[i]));
}

// All `changes` of planes [3, pixels] in place. Returns the sum of the grey levels afterwards.
int64_t recolour(const Change* changes, int count, const Crop& crop, float mean, float threshold,
                 uint8_t* planes, int64_t pixels, bool want_sum) {
    Piece piece;
    int64_t total = 0;
    for (int64_t begin = 0; begin < pixels; begin += PIECE) {
        int here = int(std::min<int64_t>(PIECE, pixels - begin));
        uint8_t* at = planes + begin;
        if (here < PIECE) piece = Piece{};
        get(at, piece.red, here);
        get(at + pixels, piece.green, here);
        get(at + 2 * pixels, piece.blue, here);
        for (int i = 0; i < count; i++) {
            switch (changes[i]) {
                case BRIGHTNESS: brightness(piece, crop.brightness); break;
                case CONTRAST: contrast(piece, crop.contrast, mean); break;
                case SATURATION: saturation(piece, crop.saturation); break;
                case HUE: hue(piece, float(crop.hue)); break;
                case GRAY: gray(piece); break;
                case SOLARIZE: solarize(piece, threshold); break;
                case NONE: break;
            }
        }
        if (count) {
            put(piece.red, at, here);
            put(piece.green, at + pixels, here);
            put(piece.blue, at + 2 * pixels, here);
        }
        if (want_sum) {
            int sum = 0;
            for (int i = 0; i < here; i++)
                sum += int(luma(piece.red[i], piece.green[i], piece.blue[i]));
            total += sum;
        }
    }
    return total;
}

// ------------------------------------------------------------------------------------------ blur

// Pillow's Gaussian: three box filters of fractional width, along rows and then columns, edge
// pixels repeated, rounded to 8 bits after each. `whole` pixels to either side count fully, the
// next ones in part.
struct Box {
    int whole;
    float inner, outer;

    explicit Box(double sigma) {
        double variance = sigma * sigma / 3, length = std::sqrt(12 * variance + 1);
        double low = std::floor((length - 1) / 2);
        double part = (2 * low + 1) * (low * (low + 1) - 3 * variance);
        double radius = low + part / (6 * (variance - (low + 1) * (low + 1)));
        whole = int(radius);
        inner = float(1 / (2 * radius + 1));
        outer = float((1 - (2 * whole + 1) / (2 * radius + 1)) / 2);
    }
};

// One filter: `from` has `whole` + 1 readable entries before and after its `count`.
template <class Number>
__attribute__((always_inline)) inline void box_pass(const Number* from, Number* to, int count,
                                                    int whole, float inner, float outer) {
    for (int i = 0; i < count; i++) {
        Number sum = from[i];
        for (int d = 1; d <= whole; d++) sum += from[i - d] + from[i + d];
        to[i] = sum * inner + (from[i - whole - 1] + from[i + whole + 1]) * outer + 0.5f;
    }
}

inline void drop_fraction(float* v, int count) {
    for (int i = 0; i < count; i++) v[i] = std::floor(v[i]);
}

// Three filters along `count` numbers that begin at `a` + margin; the result is there too.
template <class Number>
void three_passes(Number* a, Number* b, int count, const Box& box) {
    int margin = box.whole + 1;
    for (int pass = 0; pass < 3; pass++) {
        for (int i = 0; i < margin; i++) {
            a[i] = a[margin];
            a[margin + count + i] = a[margin + count - 1];
        }
        // Known widths (all up to a sigma of 2.4) let the compiler unroll the sum.
        if (box.whole == 0) box_pass(a + margin, b + margin, count, 0, box.inner, box.outer);
        else if (box.whole == 1) box_pass(a + margin, b + margin, count, 1, box.inner, box.outer);
        else box_pass(a + margin, b + margin, count, box.whole, box.inner, box.outer);
        drop_fraction(reinterpret_cast<float*>(b + margin), count * int(sizeof(Number) / 4));
        std::swap(a, b);
    }
}

void blur(uint8_t* plane, int height, int width, const Box& box, Scratch& s) {
    int margin = box.whole + 1;
    s.line.resize(width + 2 * margin), s.next.resize(width + 2 * margin);
    s.strip.resize(height + 2 * margin), s.other.resize(height + 2 * margin);
    for (int y = 0; y < height; y++) {
        uint8_t* row = plane + int64_t(y) * width;
        get(row, s.line.data() + margin, width);
        three_passes(s.line.data(), s.next.data(), width, box);
        put(s.next.data() + margin, row, width);  // after three swaps the other one holds it
    }
    for (int x = 0; x < width; x += LANES) {
        int here = std::min(width - x, LANES);
        for (int y = 0; y < height; y++) {
            Bytes levels{};
            memcpy(&levels, plane + int64_t(y) * width + x, here);
            s.strip[margin + y] = to_floats(levels);
        }
        three_passes(s.strip.data(), s.other.data(), height, box);
        for (int y = 0; y < height; y++) {
            Bytes levels = to_bytes(s.other[margin + y]);
            memcpy(plane + int64_t(y) * width + x, &levels, here);
        }
    }
}

// ------------------------------------------------------------------------------------ everything

void finish(const Crop& crop, int height, int width, float threshold, Scratch& s, uint8_t* to) {
    int64_t pixels = int64_t(height) * width;
    Change changes[6];
    int count = 0;
    for (int32_t change : crop.changes)
        if (change != NONE) changes[count++] = Change(change);
    if (crop.grayscale) changes[count++] = GRAY;
    if (crop.solarize && !(crop.sigma > 0)) changes[count++] = SOLARIZE;
    // Contrast turns about the mean of the whole crop, so all before it must be done first.
    int before = int(std::find(changes, changes + count, CONTRAST) - changes);
    float mean = 0;
    if (before < count) {
        int64_t sum = recolour(changes, before, crop, 0, threshold, to, pixels, true);
        mean = float(std::floor(double(sum) / double(pixels) + 0.5));
    } else {
        before = 0;
    }
    if (before < count)
        recolour(changes + before, count - before, crop, mean, threshold, to, pixels, false);
    if (!(crop.sigma > 0)) return;
    Box box(crop.sigma);
    for (int band = 0; band < 3; band++) {
        if (band && crop.grayscale) memcpy(to + band * pixels, to, pixels);
        else blur(to + band * pixels, height, width, box, s);
    }
    if (crop.solarize) {
        Change last = SOLARIZE;
        recolour(&last, 1, crop, 0, threshold, to, pixels, false);
    }
}

bool fits(const Image& image, const Crop& crop) {
    return crop.top >= 0 && crop.left >= 0 && crop.height > 0 && crop.width > 0 &&
           int64_t(crop.top) + crop.height <= image.height &&
           int64_t(crop.left) + crop.width <= image.width;
}

}  // namespace

// Returns 0; 1 when memory ran out; 2 when a box or slot lies outside.
extern "C" int render(const Image* images, int64_t count, const Crop* crops, const Recipe* recipe,
                      uint8_t* globals, uint8_t* locals) {
    thread_local Scratch scratch;
    const Recipe& r = *recipe;
    int64_t all = r.global_crops + r.local_crops;
    try {
        for (int64_t i = 0; i < count; i++) {
            const Image& image = images[i];
            if (image.slot < 0 || image.slot >= r.batch) return 2;
            for (int64_t number = 0; number < all; number++) {
                const Crop& crop = crops[i * all + number];
                if (!fits(image, crop)) return 2;
                bool global = number < r.global_crops;
                int height = int(global ? r.global_height : r.local_height);
                int width = int(global ? r.global_width : r.local_width);
                int64_t place = (global ? number : number - r.global_crops) * r.batch + image.slot;
                uint8_t* to = (global ? globals : locals) + place * 3 * height * width;
                resize(image, crop, height, width, r.cubic, scratch, to);
                finish(crop, height, width, float(r.solarize_threshold), scratch, to);
            }
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
