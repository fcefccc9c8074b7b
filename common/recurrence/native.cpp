// The native CPU engine: a whole sequence of h_t = g_t(z_t) φ(z_t), z_t = x_t + h_{t-1} W, in one call.
//
//   forward     z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                          t = 0 … T−1
//   backward    δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t                  t = T−1 … 0
//
// Shapes: x, h, z, δz (T, B, H); W (H, H); numbers (T,); modReLU's b (H,). The formulas are those of
// common/stair.py, written again because here they run on vectors still hot from the product.
//
//   gradient    dW = Σ_t h_{t-1}ᵀ δz_t                                                 after the backward pass
//
// Beside it W = exp(S) and its adjoint, on the same tiles. What is saved are calls of torch, each of which finds the
// caches full of other numbers.
//
// Why it is fast. Rows (examples) do not depend on each other, so every thread takes its share of the rows
// through all T steps and no thread ever waits for another. W is packed once per call into panels of a few
// vectors of columns, stored in the order in which they are read. A tile of the product is TILE_ROWS rows times
// one panel; its sums stay in registers for the whole depth H, then stair and nonlinearity finish the tile
// while it lies in the first-level cache. One panel serves all row tiles of the share before the next panel is
// touched, so a W that is larger than the cache (H ≥ 512) still comes from it. What a tile will be finished with
// (x_t; h_t, its gradient, the place of the result) comes from farther away than W and in no order that a processor
// foresees, so it is fetched while the tile is multiplied, a row at a time. (Tiles of register sums over packed panels:
// Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; the time loop inside the kernel
// over blocked weights: Banerjee et al., "Optimizing deep learning RNN topologies on Intel architecture", 2019.)
//
// How near to the peak these calls come, the wrapper around them left out (Zen 4, AVX-512, one thread). A tile of R
// rows takes 4 R H cycles of multiply-adds, one a cycle. With one constant beside it, about 560 cycles a tile whatever H is,
// that gives 82, 91 and 96 % of the peak for H = 128, 256 and 512 with 5, 5⅓ and 6 rows; measured forward: 80, 91 and
// 96 %. The constant is fitted, its parts were not measured one by one; in it lie the finishing of 4 R vectors, the
// requests of what comes next and the start and end of the chains of multiply-adds. At H = 128 it is a fifth, and the
// shape of the tile does not change it. At H = 1024, 92 %: W (4 MB) is larger than the second-level cache. The backward
// pass touches twice the arrays: 77, 86, 93 and 92 %. dW takes H/8 multiply-adds a number that it reads from the
// third-level cache: 77, 84, 86 and 90 %.
//
// Every number of the result is summed in an order that depends on neither the tiling of the rows nor the
// number of threads: the result has the same bits for any number of threads. dW is shared by its rows.
//
// Denormal numbers are flushed to zero in here, always, and the caller's mode is restored. A gradient
// that fades through hundreds of steps spends most of them below 1e−38, where it teaches nothing and every
// operation takes a hundred times as long.
//
// Vectors are the vector extension of GCC and Clang: one source for AVX-512, AVX2, SSE2 and NEON. native_build.py
// compiles it once for STAIR_SCALAR=float and, when somebody asks for it, once more for STAIR_SCALAR=double.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

extern "C" {

// Everything that the entry points need; native_build.py declares the same fields in the same order.
// Strides count numbers, not bytes. The last dimension of every array is contiguous, W's excepted.
struct Call {
    // sizes and choices
    std::int64_t steps, batch, hidden, threads, rule, phi;
    // distance from a step to the next and from a row to the next; W: from an input to the next, an output to the next
    std::int64_t kernel_in, kernel_out, x_step, x_row, h0_row, grad_step, grad_row;
    // GOMP_parallel(function, argument, threads, flags) of the OpenMP runtime that torch uses, or null
    void (*openmp_parallel)(void (*)(void *), void *, unsigned, unsigned);
    // inputs
    const void *kernel, *x, *h0, *numbers, *bias;
    const std::int64_t *kept;  // (T,) the place of z_t in z, −1 where it is not kept; null: kept nowhere
    // states: h (T, B, H), or null when only `last` (B, H) is wanted; z (kept, B, H)
    void *h, *last, *z;
    // gradients: grad (T, B, H), or grad_last (B, H) of the last state alone; the results, null where not wanted
    const void *grad, *grad_last;
    void *dz, *d_h0, *d_numbers, *d_bias, *d_kernel;
    // W = exp(S): the numbers above S's diagonal row by row; the polynomial of common/orthogonal.py and the largest
    // norm that it serves; S and S² (2, H, H); what the backward pass needs (3 + squarings, H, H); W; scratch
    // (6, H, H); how often S is halved
    const void *logarithm, *grad_rotation;
    const double *polynomial;
    void *squares, *kept_products, *rotation, *room, *d_logarithm;
    mutable std::int64_t squarings;
};

int stair_forward(const Call *call);   // fills h or last, and z where kept
int stair_backward(const Call *call);  // fills dz, and d_h0, d_numbers, d_bias where wanted
int stair_states(const Call *call);    // fills h from z, both (T, B, H)
int stair_kernel_gradient(const Call *call);  // adds Σ_t h_{t-1}ᵀ δz_t to d_kernel; without an h0, Σ_t h_tᵀ δz_t
int stair_square(const Call *call);                // fills squares, unscaled, and squarings
int stair_exponential(const Call *call);           // scales squares, fills kept_products and rotation
int stair_exponential_backward(const Call *call);  // fills d_logarithm

double stair_smallest(const void *numbers, std::int64_t count);  // the least |number|; NaN counts for nothing
double stair_multiply_adds(std::int64_t rounds);                 // the yardstick: multiply-adds → how many operations
}

namespace {

using Index = std::ptrdiff_t;

enum Rule { SCALE, EXPONENTIAL, LITERAL, RULES };
enum Phi { NONE, TANH, RELU, MODRELU, SIGMOID, PHIS };

// ---------------------------------------------------------------------------------------------- vectors

// A tile keeps TILE_ROWS × TILE_VECTORS sums in registers and needs TILE_VECTORS + 1 or 2 more of them: 24 of the
// 32 registers of AVX-512 and NEON, 12 of the 16 of AVX2 and SSE2. Both are enough independent
// sums to hide the latency of a fused multiply-add, and load far less than they multiply.
#if defined(__AVX512F__)
constexpr Index VECTOR_BYTES = 64, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr Index VECTOR_BYTES = 32, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr Index VECTOR_BYTES = 16, TILE_VECTORS = 4;
#else
constexpr Index VECTOR_BYTES = 16, TILE_VECTORS = 2;
#endif
constexpr Index TILE_ROWS = 6;

template <class S>
using IntegerOf = std::conditional_t<sizeof(S) == 4, std::int32_t, std::int64_t>;

template <class S>
struct VectorOf {
    typedef S Type __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef IntegerOf<S> Bits __attribute__((vector_size(VECTOR_BYTES)));
};
template <class S>
using Vector = typename VectorOf<S>::Type;
template <class S>
using Bits = typename VectorOf<S>::Bits;

template <class S>
constexpr Index LANES = VECTOR_BYTES / Index(sizeof(S));

template <class S>
inline Vector<S> load(const S *from) {
    Vector<S> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class S>
inline void store(S *to, Vector<S> v) {
    std::memcpy(to, &v, sizeof v);
}

// Copies fewer numbers than a vector has, in pieces of halving size: no access outside the array.
template <class S>
inline void copy_few(S *to, const S *from, Index count) {
    for (Index piece = LANES<S> / 2; piece > 0; piece /= 2)
        if (count & piece) {
            std::memcpy(to, from, std::size_t(piece) * sizeof(S));
            to += piece;
            from += piece;
        }
}

// The first `count` numbers of a vector; the rest reads as 0 and is not written.
template <class S>
inline Vector<S> load(const S *from, Index count) {
    if (count >= LANES<S>) return load(from);
    S few[LANES<S>] = {};
    copy_few(few, from, count);
    return load(few);
}

template <class S>
inline void store(S *to, Vector<S> v, Index count) {
    if (count >= LANES<S>) return store(to, v);
    S few[LANES<S>];
    store(few, v);
    copy_few(to, few, count);
}

template <class S>
inline double sum_of_lanes(Vector<S> v) {
    double sum = 0;
    for (Index lane = 0; lane < LANES<S>; lane++) sum += double(v[lane]);
    return sum;
}

// ------------------------------------------------------------------------- stair and nonlinearity, z → h

template <class S>
inline Vector<S> absolute(Vector<S> v) {
    return Vector<S>(Bits<S>(v) & std::numeric_limits<IntegerOf<S>>::max());
}

// |magnitude| with the sign of `sign`
template <class S>
inline Vector<S> with_sign(Vector<S> magnitude, Vector<S> sign) {
    constexpr IntegerOf<S> sign_bit = std::numeric_limits<IntegerOf<S>>::min();
    return Vector<S>((Bits<S>(magnitude) & ~sign_bit) | (Bits<S>(sign) & sign_bit));
}

template <class S>
struct Exponentials {
    Vector<S> exp, expm1;  // e^v and e^v − 1, each to a few units in its own last place
};

// e^v = 2^n e^r with n the nearest integer to v / ln 2, so |r| ≤ ln 2 / 2, and e^r − 1 by its Taylor polynomial.
// Both results come from the same halves, 2^(n−1) e^r, so that neither overflows before e^v does.
template <class S>
inline Exponentials<S> exponentials(Vector<S> v) {
    constexpr bool single = sizeof(S) == 4;
    constexpr int mantissa = std::numeric_limits<S>::digits - 1, degree = single ? 7 : 13;
    constexpr IntegerOf<S> exponent_bias = std::numeric_limits<S>::max_exponent - 1;
    constexpr S lowest = single ? S(-86) : S(-707), highest = single ? S(89) : S(710);
    constexpr S ln2_high = single ? S(0.693359375) : S(0x1.62e42feep-1);  // few bits: n · ln2_high is exact
    constexpr S ln2_low = single ? S(-2.12194440054690582768e-4) : S(1.90821492927058770002e-10);  // the rest of ln 2
    constexpr S to_integer = S(3) * S(std::int64_t(1) << (mantissa - 1));  // adding it leaves v rounded in the low bits

    const Bits<S> vanishes = v < lowest;
    Vector<S> u = vanishes ? lowest - Vector<S>{} : v;  // a NaN passes every comparison here unchanged
    u = u > highest ? highest - Vector<S>{} : u;
    const Vector<S> shifted = u * S(1.44269504088896340736) + to_integer;
    const Vector<S> n = shifted - to_integer;
    const Vector<S> r = (u - n * ln2_high) - n * ln2_low;

    S factorial = 1;
    S inverse[degree + 1] = {S(1)};
    for (int k = 1; k <= degree; k++) inverse[k] = S(1) / (factorial *= S(k));
    Vector<S> p = inverse[degree] - Vector<S>{};
    for (int k = degree - 1; k >= 1; k--) p = p * r + inverse[k];
    p *= r;  // e^r − 1

    const Bits<S> n_bits = Bits<S>(shifted) - Bits<S>(to_integer - Vector<S>{});
    const Vector<S> half = Vector<S>((n_bits + (exponent_bias - 1)) << mantissa);  // 2^(n−1)
    const Vector<S> exp = S(2) * (half + half * p), expm1 = S(2) * ((half - S(0.5)) + half * p);
    return {vanishes ? Vector<S>{} : exp, vanishes ? S(-1) - Vector<S>{} : expm1};
}

// φ(z), and on request its derivatives with respect to z and to modReLU's b
template <class S>
struct Activation {
    Vector<S> value, by_z, by_bias;
};

template <class S, Phi phi>
inline Activation<S> nonlinearity(Vector<S> z, Vector<S> bias) {
    const Vector<S> zero = {}, one = S(1) - zero;
    if constexpr (phi == MODRELU) {
        const Vector<S> reach = absolute<S>(z) + bias;
        const Bits<S> off = (reach <= 0) | (z == 0);  // sign(0) = 0: z = 0 gives 0 even where b > 0
        const Vector<S> on = off ? zero : one;
        return {off ? zero : with_sign<S>(reach, z), on, with_sign<S>(on, z)};
    } else if constexpr (phi == RELU) {
        const Bits<S> off = z <= 0;
        return {off ? zero : z, off ? zero : one, zero};
    } else if constexpr (phi == TANH) {
        const Vector<S> e = exponentials<S>(S(-2) * absolute<S>(z)).expm1;
        const Vector<S> tanh = with_sign<S>(e / (e + S(2)), z);
        return {tanh, one - tanh * tanh, zero};
    } else if constexpr (phi == SIGMOID) {
        const Vector<S> e = exponentials<S>(-absolute<S>(z)).exp;
        const Vector<S> sigmoid = (z < 0 ? e : one) / (one + e);
        return {sigmoid, sigmoid * (one - sigmoid), zero};
    } else {
        return {z, one, zero};
    }
}

// h = g(z) φ(z) and its derivatives with respect to z, the step's number and modReLU's b
template <class S>
struct State {
    Vector<S> value, by_z, by_number, by_bias;
};

template <class S, Rule rule, Phi phi>
inline State<S> state_from_z(Vector<S> z, S number, Vector<S> bias) {
    const Activation<S> f = nonlinearity<S, phi>(z, bias);
    if constexpr (rule == SCALE) {
        return {number * f.value, number * f.by_z, f.value, number * f.by_bias};
    } else {
        const Vector<S> zero = {}, one = S(1) - zero;
        const Vector<S> size = rule == EXPONENTIAL ? absolute<S>(z) : z;
        const Vector<S> direction = rule == EXPONENTIAL ? (z == 0 ? zero : with_sign<S>(one, z)) : one;
        const Exponentials<S> e = exponentials<S>(-number * size);
        const Vector<S> g = -e.expm1;
        return {g * f.value, g * f.by_z + number * direction * e.exp * f.value, size * e.exp * f.value, g * f.by_bias};
    }
}

// The derivatives of h = ρ φ(z) from h alone: φ = h / ρ tells everything about z that they need. ρ ≠ 0.
template <class S, Phi phi>
inline State<S> scaled_state_from_h(Vector<S> h, S number, S inverse) {
    const Vector<S> zero = {}, size = number - zero;
    const Vector<S> f = h * inverse;
    if constexpr (phi == MODRELU) {
        const Vector<S> by_z = h == 0 ? zero : size;
        return {h, by_z, f, with_sign<S>(by_z, h)};  // ρ sign(z) = |ρ| sign(h)
    } else if constexpr (phi == RELU) {
        return {h, h == 0 ? zero : size, f, zero};
    } else if constexpr (phi == TANH) {
        return {h, number * (S(1) - f * f), f, zero};
    } else if constexpr (phi == SIGMOID) {
        return {h, h * (S(1) - f), f, zero};
    } else {
        return {h, size, f, zero};
    }
}

// ------------------------------------------------------------------------------ the product, tile by tile

// Numbers that begin at a multiple of the vector's size, all 0 at first.
template <class S>
class Aligned {
public:
    explicit Aligned(Index count) : room(new S[std::size_t(count + LANES<S>)]()) {
        const auto address = reinterpret_cast<std::uintptr_t>(room.get());
        first = room.get() + (std::uintptr_t(-std::intptr_t(address)) % VECTOR_BYTES) / sizeof(S);
    }
    S *data() { return first; }
    const S *data() const { return first; }

private:
    std::unique_ptr<S[]> room;
    S *first;
};

struct Panel {
    Index column, vectors;  // its first column of W and its width in vectors
};

// The panels of `hidden` columns: at most TILE_VECTORS vectors each, widths as equal as possible.
template <class S>
std::vector<Panel> panels_of(Index hidden) {
    const Index vectors = (hidden + LANES<S> - 1) / LANES<S>, count = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
    std::vector<Panel> panels;
    for (Index p = 0; p < count; p++) {
        const Index first = vectors * p / count, end = vectors * (p + 1) / count;
        panels.push_back({first * LANES<S>, end - first});
    }
    return panels;
}

// Calls body(column, count) for the vectors of columns column … that lie inside a row of `hidden` numbers.
template <class S, class Body>
inline void for_each_vector(Index column, Index vectors, Index hidden, Body body) {
    for (Index v = 0; v < vectors; v++, column += LANES<S>) body(v * LANES<S>, column, std::min(LANES<S>, hidden - column));
}

// A matrix (depth, columns) in panels. Inside a panel a row follows the other; columns beyond the last are 0. Element
// (k, j) is read from matrix[k · in + j · out].
template <class S>
class Packed {
public:
    Packed() : depth(0), columns(0), numbers(0) {}
    Packed(const S *matrix, Index in, Index out, Index depth, Index columns)
        : depth(depth), columns(columns), panels(panels_of<S>(columns)), numbers((columns + LANES<S>) * depth) {
        for (const Panel &panel : panels) pack(matrix, in, out, panel);
    }
    const S *data(const Panel &panel) const { return numbers.data() + panel.column * depth; }

    const Index depth, columns;
    const std::vector<Panel> panels;

private:
    // A row at a time, or else blocks of the depth, so that a column-wise read of the matrix still uses the whole of
    // each cache line.
    void pack(const S *matrix, Index in, Index out, const Panel &panel) {
        constexpr Index block = 16;
        const Index width = panel.vectors * LANES<S>, count = std::min(width, columns - panel.column);
        S *to = numbers.data() + panel.column * depth;
        if (out == 1)
            for (Index k = 0; k < depth; k++)
                for_each_vector<S>(panel.column, panel.vectors, columns, [&](Index offset, Index c, Index n) {
                    store(to + k * width + offset, load(matrix + k * in + c, n));
                });
        else
            for (Index start = 0; start < depth; start += block)
                for (Index j = 0; j < count; j++)
                    for (Index k = start; k < std::min(start + block, depth); k++)
                        to[k * width + j] = matrix[k * in + (panel.column + j) * out];
    }

    Aligned<S> numbers;
};

// Rows of an array that will be needed soon: `first`, first + stride, … Null: none.
template <class S>
struct Stream {
    const S *first;
    Index stride;
};
template <class S>
using Streams = std::array<Stream<S>, 5>;

// tile (ROWS, VECTORS) = rows (ROWS, depth) · panel (depth, VECTORS), all sums in registers. Element (r, k) of the rows
// is rows[r · row_stride + k · depth_stride]. A tile's width of each of its rows of `soon` is fetched meanwhile, a row
// at a time: more requests at once than the cache can have under way would stop the multiplication.
template <class S, int ROWS, int VECTORS>
void multiply_tile(const S *rows, Index row_stride, Index depth_stride, const S *panel, Index depth, S *tile,
                   const Streams<S> &soon) {
    Vector<S> sums[ROWS][VECTORS] = {};
    Index k = 0;
    for (int part = 0; part < ROWS; part++) {
        for (const Stream<S> &stream : soon)
            if (stream.first)
                for (int v = 0; v < VECTORS; v++)
                    __builtin_prefetch(stream.first + part * stream.stride + v * LANES<S>);
        for (const Index end = depth * (part + 1) / ROWS; k < end; k++) {
            Vector<S> w[VECTORS];
            for (int v = 0; v < VECTORS; v++) w[v] = load(panel + (k * VECTORS + v) * LANES<S>);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++) sums[r][v] += rows[r * row_stride + k * depth_stride] * w[v];
        }
    }
    Vector<S> *out = reinterpret_cast<Vector<S> *>(tile);
#pragma GCC unroll 16  // or GCC writes the sums to the stack first
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) out[r * VECTORS + v] = sums[r][v];
}

template <class S>
using MultiplyTile = void (*)(const S *, Index, Index, const S *, Index, S *, const Streams<S> &);

// multiply_tile for every size: entry (rows − 1) · TILE_VECTORS + (vectors − 1)
template <class S, int... SIZE>
const MultiplyTile<S> *tile_table(std::integer_sequence<int, SIZE...>) {
    static const MultiplyTile<S> table[] = {multiply_tile<S, SIZE / TILE_VECTORS + 1, SIZE % TILE_VECTORS + 1>...};
    return table;
}

template <class S>
const MultiplyTile<S> *all_tiles() {
    return tile_table<S>(std::make_integer_sequence<int, TILE_ROWS * TILE_VECTORS>());
}

// Calls finish(row, column, vectors, sums) for every row and panel of rows · W; sums (vectors · LANES,) are that row's
// products in those columns, all 0 if `rows` is null. `streams` are the arrays that finish touches at row and column.
template <class S, class Finish>
void product(const Packed<S> &kernel, const S *rows, Index stride, Index count, const Streams<S> &streams,
             Finish finish) {
    const MultiplyTile<S> *table = all_tiles<S>();
    alignas(VECTOR_BYTES) S tile[TILE_ROWS * TILE_VECTORS * LANES<S>] = {};
    const Index tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    for (const Panel &panel : kernel.panels)
        for (Index i = 0; i < tiles; i++) {
            const Index first = count * i / tiles, height = count * (i + 1) / tiles - first;
            if (rows) {
                Streams<S> soon = streams;
                for (Stream<S> &stream : soon)
                    if (stream.first) stream.first += first * stream.stride + panel.column;
                table[(height - 1) * TILE_VECTORS + panel.vectors - 1](rows + first * stride, stride, 1,
                                                                       kernel.data(panel), kernel.depth, tile, soon);
            }
            for (Index r = 0; r < height; r++)
                finish(first + r, panel.column, panel.vectors, tile + r * panel.vectors * LANES<S>);
        }
}

// ------------------------------------------------------------------------------------------- the sequence

// The arrays of a call as numbers of type S, and what all threads share.
template <class S>
struct Sequence {
    explicit Sequence(const Call &call)
        : call(call), steps(call.steps), batch(call.batch), hidden(call.hidden),
          numbers(static_cast<const S *>(call.numbers)), bias(hidden + LANES<S>) {
        if (call.bias) std::memcpy(bias.data(), call.bias, std::size_t(hidden) * sizeof(S));
        if (call.d_numbers) number_parts.resize(std::size_t(steps * batch));
        if (call.d_bias) bias_parts.resize(std::size_t(batch * hidden));
    }
    void add_parts() const {
        for (Index t = 0; call.d_numbers && t < steps; t++) {
            double sum = 0;
            for (Index row = 0; row < batch; row++) sum += number_parts[t * batch + row];
            static_cast<S *>(call.d_numbers)[t] = S(sum);
        }
        for (Index j = 0; call.d_bias && j < hidden; j++) {
            double sum = 0;
            for (Index row = 0; row < batch; row++) sum += double(bias_parts[row * hidden + j]);
            static_cast<S *>(call.d_bias)[j] = S(sum);
        }
    }
    // row `row` of step t in an array (T, B, H)
    template <class T>
    T *at(T *array, Index t, Index row) const {
        return array + (t * batch + row) * hidden;
    }
    // the kept z_t from row `row` on, or null
    S *kept(Index t, Index row) const {
        return call.kept && call.kept[t] >= 0 ? at(static_cast<S *>(call.z), call.kept[t], row) : nullptr;
    }

    const Call &call;
    const Index steps, batch, hidden;
    const S *numbers;
    Aligned<S> bias;  // padded to whole vectors
    // What each row adds to the gradients of the numbers (T, B) and of b (B, H); empty where they are not wanted.
    // Added up at the end, in the order of the rows: the sum is the same for any number of threads.
    mutable std::vector<double> number_parts;
    mutable std::vector<S> bias_parts;
};

template <class S, Rule rule, Phi phi>
void forward_rows(const Sequence<S> &s, const Packed<S> &kernel, Index first, Index end) {
    const Call &call = s.call;
    const Index count = end - first;
    S *h = static_cast<S *>(call.h);
    std::vector<S> pair(h ? 0 : std::size_t(2 * count * s.hidden));  // without h, two states take turns
    const S *previous = static_cast<const S *>(call.h0) + first * call.h0_row;
    Index stride = call.h0_row;
    for (Index t = 0; t < s.steps; t++) {
        const S *x = static_cast<const S *>(call.x) + t * call.x_step + first * call.x_row;
        const S number = s.numbers[t];
        S *z = s.kept(t, first);
        S *next = h ? s.at(h, t, first) : pair.data() + (t % 2) * count * s.hidden;
        const Streams<S> streams = {{{x, call.x_row}, {next, s.hidden}, {z, s.hidden}}};
        product(kernel, previous, stride, count, streams, [&](Index row, Index column, Index vectors, const S *sums) {
            for_each_vector<S>(column, vectors, s.hidden, [&](Index offset, Index c, Index n) {
                const Vector<S> z_t = load(sums + offset) + load(x + row * call.x_row + c, n);
                if (z) store(z + row * s.hidden + c, z_t, n);
                store(next + row * s.hidden + c, state_from_z<S, rule, phi>(z_t, number, load(s.bias.data() + c)).value, n);
            });
        });
        previous = next;
        stride = s.hidden;
    }
    if (call.last)
        std::memcpy(static_cast<S *>(call.last) + first * s.hidden, previous, std::size_t(count * s.hidden) * sizeof(S));
}

template <class S, Rule rule, Phi phi>
void backward_rows(const Sequence<S> &s, const Packed<S> &transposed, Index first, Index end) {
    const Call &call = s.call;
    const Index count = end - first;
    S *dz = static_cast<S *>(call.dz);
    S *bias_parts = call.d_bias ? s.bias_parts.data() + first * s.hidden : nullptr;
    Aligned<S> number_sums(count * LANES<S>);  // one vector of sums per row
    const S *dz_next = nullptr;                // after the last step nothing flows back
    for (Index t = s.steps - 1; t >= 0; t--) {
        const S number = s.numbers[t], inverse = S(1) / number;
        const S *grad = call.grad                               ? static_cast<const S *>(call.grad) + t * call.grad_step
                        : call.grad_last && t == s.steps - 1 ? static_cast<const S *>(call.grad_last)
                                                                : nullptr;
        if (grad) grad += first * call.grad_row;
        const S *z = s.kept(t, first), *h = z ? nullptr : s.at(static_cast<const S *>(call.h), t, first);
        S *dz_t = s.at(dz, t, first);
        const Streams<S> streams = {
            {{grad, call.grad_row}, {z ? z : h, s.hidden}, {dz_t, s.hidden}, {bias_parts, s.hidden}}};
        const auto finish = [&](Index row, Index column, Index vectors, const S *sums) {
            for_each_vector<S>(column, vectors, s.hidden, [&](Index offset, Index c, Index n) {
                const Index place = row * s.hidden + c;
                Vector<S> dh = load(sums + offset);
                if (grad) dh += load(grad + row * call.grad_row + c, n);
                State<S> state;
                if (rule != SCALE || z)
                    state = state_from_z<S, rule, phi>(load(z + place, n), number, load(s.bias.data() + c));
                else
                    state = scaled_state_from_h<S, phi>(load(h + place, n), number, inverse);
                store(dz_t + place, dh * state.by_z, n);
                if (call.d_numbers) {
                    S *sum = number_sums.data() + row * LANES<S>;
                    store(sum, load(sum) + dh * state.by_number);
                }
                if (phi == MODRELU && bias_parts)
                    store(bias_parts + place, load(bias_parts + place, n) + dh * state.by_bias, n);
            });
        };
        product(transposed, dz_next, s.hidden, count, streams, finish);
        for (Index row = 0; call.d_numbers && row < count; row++) {
            S *sum = number_sums.data() + row * LANES<S>;
            s.number_parts[t * s.batch + first + row] = sum_of_lanes<S>(load(sum));
            store(sum, Vector<S>{});
        }
        dz_next = dz_t;
    }
    if (call.d_h0)
        product(transposed, dz_next, s.hidden, count, {}, [&](Index row, Index column, Index vectors, const S *sums) {
            for_each_vector<S>(column, vectors, s.hidden, [&](Index offset, Index c, Index n) {
                store(static_cast<S *>(call.d_h0) + (first + row) * s.hidden + c, load(sums + offset), n);
            });
        });
}

// h from kept z, elementwise, for the gradient of W
template <class S, Rule rule, Phi phi>
void states_rows(const Sequence<S> &s, const Packed<S> &, Index first, Index end) {
    const Index vectors = (s.hidden + LANES<S> - 1) / LANES<S>;
    for (Index t = 0; t < s.steps; t++)
        for (Index row = first; row < end; row++) {
            const S *z = s.at(static_cast<const S *>(s.call.z), t, row);
            S *h = s.at(static_cast<S *>(s.call.h), t, row);
            for_each_vector<S>(0, vectors, s.hidden, [&](Index, Index c, Index n) {
                const Vector<S> bias = load(s.bias.data() + c);
                store(h + c, state_from_z<S, rule, phi>(load(z + c, n), s.numbers[t], bias).value, n);
            });
        }
}

// ------------------------------------------------------------------------------------- the gradient of W

// to (depth, ROWS) = the first ROWS numbers of each row
template <class S, int ROWS>
void pack_rows(const S *from, Index stride, Index depth, S *to) {
    for (Index k = 0; k < depth; k++) std::memcpy(to + k * ROWS, from + k * stride, ROWS * sizeof(S));
}

template <class S>
using PackRows = void (*)(const S *, Index, Index, S *);

template <class S, int... ROWS>
const PackRows<S> *pack_table(std::integer_sequence<int, ROWS...>) {
    static const PackRows<S> table[] = {pack_rows<S, ROWS + 1>...};
    return table;
}

// d_kernel[i][j] += Σ_r previous[r][i] · dz[r][j] for i = first … end − 1; r counts `count` steps and examples. DEPTH
// of them at a time are packed in the order in which tiles read them.
template <class S>
void add_products(const Sequence<S> &s, const S *previous, Index stride, const S *dz, Index count, Index first,
                  Index end) {
    constexpr Index DEPTH = 256, LINE = TILE_VECTORS * LANES<S>, BLOCK = TILE_ROWS * LINE;
    constexpr Index FETCHED = 256 * DEPTH;  // numbers of a stretch that the second-level cache has room for
    const MultiplyTile<S> *multiply = all_tiles<S>();
    const PackRows<S> *pack = pack_table<S>(std::make_integer_sequence<int, TILE_ROWS>());
    const std::vector<Panel> panels = panels_of<S>(s.hidden);
    const Index tiles = (end - first + TILE_ROWS - 1) / TILE_ROWS;
    const auto tile_start = [&](Index i) { return first + (end - first) * i / tiles; };
    Aligned<S> left(DEPTH * (end - first)), right(DEPTH * LINE);
    alignas(VECTOR_BYTES) S tile[BLOCK];
    S *d_kernel = static_cast<S *>(s.call.d_kernel);
    for (Index start = 0; start < count; start += DEPTH) {
        const Index depth = std::min(DEPTH, count - start);
        for (Index i = 0; i < tiles; i++) {
            const Index row = tile_start(i), height = tile_start(i + 1) - row;
            pack[height - 1](previous + start * stride + row, stride, depth, left.data() + (row - first) * depth);
        }
        // The next stretch lies far away: it is fetched while this one is multiplied, a block with every tile.
        const bool fetches = stride == s.hidden && DEPTH * s.hidden <= FETCHED;
        Index ahead = (start + depth) * s.hidden;
        const Index ahead_end = fetches ? std::min(start + 2 * DEPTH, count) * s.hidden : ahead;
        for (const Panel &panel : panels) {
            const Index width = panel.vectors * LANES<S>;
            for (Index k = 0; k < depth; k++)
                for_each_vector<S>(panel.column, panel.vectors, s.hidden, [&](Index offset, Index c, Index n) {
                    store(right.data() + k * width + offset, load(dz + (start + k) * s.hidden + c, n));
                });
            for (Index i = 0; i < tiles; i++) {
                const Index row = tile_start(i), height = tile_start(i + 1) - row;
                S *to = d_kernel + row * s.hidden;
                Streams<S> soon = {{{to + panel.column, s.hidden}}};
                if (ahead < ahead_end) {
                    soon[1] = {previous + ahead, LINE}, soon[2] = {previous + ahead + BLOCK, LINE};
                    soon[3] = {dz + ahead, LINE}, soon[4] = {dz + ahead + BLOCK, LINE};
                    ahead += 2 * BLOCK;
                }
                const S *rows = left.data() + (row - first) * depth;
                const Index size = (height - 1) * TILE_VECTORS + panel.vectors - 1;
                multiply[size](rows, 1, height, right.data(), depth, tile, soon);
                for (Index r = 0; r < height; r++)
                    for_each_vector<S>(panel.column, panel.vectors, s.hidden, [&](Index offset, Index c, Index n) {
                        S *place = to + r * s.hidden + c;
                        store(place, load(place, n) + load(tile + r * width + offset), n);
                    });
            }
        }
    }
}

template <class S>
void kernel_gradient_rows(const Sequence<S> &s, Index first, Index end) {
    const S *h0 = static_cast<const S *>(s.call.h0), *h = static_cast<const S *>(s.call.h);
    const S *dz = static_cast<const S *>(s.call.dz);
    const Index with_h0 = h0 ? 1 : 0;  // steps
    if (h0) add_products(s, h0, s.call.h0_row, dz, s.batch, first, end);
    add_products(s, h, s.hidden, s.at(dz, with_h0, 0), (s.steps - with_h0) * s.batch, first, end);
}

// ------------------------------------------------------------------------------ threads and entry points

// For the lifetime of the object this thread's denormal results and operands are 0.
class FlushDenormals {
public:
    FlushDenormals() : before(read()) { write(before | FLUSH); }
    ~FlushDenormals() { write(before); }
    FlushDenormals(const FlushDenormals &) = delete;

private:
#if defined(__SSE2__)
    using Mode = unsigned;
    static constexpr Mode FLUSH = 0x8040;  // MXCSR: flush to zero, denormals are zero
    static Mode read() { return _mm_getcsr(); }
    static void write(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
    using Mode = std::uint64_t;
    static constexpr Mode FLUSH = 1 << 24;  // FPCR.FZ
    static Mode read() {
        Mode mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void write(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
    using Mode = unsigned;
    static constexpr Mode FLUSH = 0;
    static Mode read() { return 0; }
    static void write(Mode) {}
#endif
    const Mode before;
};

// The rows in equal shares, one per thread. Whoever calls `take` works on shares until none is left: it does not matter
// how many threads really come.
class Shares {
public:
    Shares(Index rows, Index count, const std::function<void(Index, Index)> &work)
        : rows(rows), count(count), work(work) {}

    void take() {
        const FlushDenormals flush;
        try {
            for (Index i; (i = next++) < count;) work(rows * i / count, rows * (i + 1) / count);
        } catch (const std::bad_alloc &) {
            out_of_memory = true;
        }
    }
    static void take_from(void *shares) { static_cast<Shares *>(shares)->take(); }

    std::atomic<bool> out_of_memory{false};

private:
    const Index rows, count;
    const std::function<void(Index, Index)> &work;
    std::atomic<Index> next{0};
};

// Calls shares.take() in `threads` threads of our own. Fewer do if the system has no more to give.
void take_in_own_threads(Shares &shares, Index threads) {
    std::vector<std::thread> others;
    others.reserve(std::size_t(threads));
    try {
        while (Index(others.size()) < threads - 1) others.emplace_back(&Shares::take, &shares);
    } catch (const std::system_error &) {
    }
    shares.take();
    for (std::thread &other : others) other.join();
}

// Runs work(first, end) on `rows` rows, shared among the threads, and returns when all are done. Throws std::bad_alloc
// if memory ran out in one of them.
//
// The threads are those of the OpenMP runtime in which torch works, where there is one. After a matrix product
// torch's idle threads spin for some milliseconds, waiting for more: threads of our own would have to share the
// cores with them, and short sequences would take twice as long.
void share_rows(const Call &call, Index rows, const std::function<void(Index, Index)> &work) {
    const Index threads = std::max<Index>(1, std::min(call.threads, rows));
    Shares shares(rows, threads, work);
    if (threads == 1)
        shares.take();
    else if (call.openmp_parallel)
        call.openmp_parallel(Shares::take_from, &shares, unsigned(threads), 0);
    else
        take_in_own_threads(shares, threads);
    if (shares.out_of_memory) throw std::bad_alloc();
}

enum Pass { FORWARD, BACKWARD, STATES };

template <class S>
using RowsPass = void (*)(const Sequence<S> &, const Packed<S> &, Index, Index);

template <Pass pass, class S, Rule rule, Phi phi>
constexpr RowsPass<S> rows_pass() {
    return pass == FORWARD    ? forward_rows<S, rule, phi>
           : pass == BACKWARD ? backward_rows<S, rule, phi>
                              : states_rows<S, rule, phi>;
}

// The pass for a rule and φ that are known only now: entry rule · PHIS + phi
template <Pass pass, class S, int... CHOICE>
RowsPass<S> choose(Index choice, std::integer_sequence<int, CHOICE...>) {
    static constexpr RowsPass<S> table[] = {rows_pass<pass, S, Rule(CHOICE / PHIS), Phi(CHOICE % PHIS)>()...};
    return table[choice];
}

template <Pass pass, class S>
void run(const Call &call) {
    const RowsPass<S> rows = choose<pass, S>(call.rule * PHIS + call.phi, std::make_integer_sequence<int, RULES * PHIS>());
    const Sequence<S> s(call);
    const S *matrix = static_cast<const S *>(call.kernel);
    const Packed<S> kernel = pass == FORWARD    ? Packed<S>(matrix, call.kernel_in, call.kernel_out, s.hidden, s.hidden)
                             : pass == BACKWARD ? Packed<S>(matrix, call.kernel_out, call.kernel_in, s.hidden, s.hidden)
                                                : Packed<S>();
    share_rows(call, s.batch, [&](Index first, Index end) { rows(s, kernel, first, end); });
    if (pass == BACKWARD) s.add_parts();
}

template <class S>
void run_kernel_gradient(const Call &call) {
    const Sequence<S> s(call);
    share_rows(call, s.hidden, [&](Index first, Index end) { kernel_gradient_rows(s, first, end); });
}

// ---------------------------------------------------------------------------------------- the exponential

// W = exp(S) and its adjoint, by the formulas of common/orthogonal.py: the same products in the same order, without a
// pass over a matrix for each sum.
template <class S>
class Exponential {
public:
    explicit Exponential(const Call &call)
        : call(call), hidden(call.hidden), size(hidden * hidden), a(static_cast<S *>(call.squares)), a2(a + size),
          inner(static_cast<S *>(call.kept_products)), left(inner + size), right(left + size) {
        const double *p = call.polynomial;
        for (S *x : {&x1, &x2, &x3, &x4, &x5, &y1, &y2, &y3}) *x = S(*p++);
    }

    void square() const {
        const S *above = static_cast<const S *>(call.logarithm);
        for (Index i = 0; i < hidden; above += hidden - ++i) {
            std::fill_n(a2 + i * hidden, i + 1, S(0));
            std::copy_n(above, hidden - i - 1, a2 + i * (hidden + 1) + 1);
        }
        transpose(a, a2);
        combine(a, {{{1, a2}, {-1, a}}});
        multiply(a2, 1, a, a);
        double largest = 0;  // √‖S²‖₁; S² is symmetric
        for (Index i = 0; i < hidden; i++) {
            Vector<S> sums = {};
            for (Index j = 0; j < hidden; j += LANES<S>) {
                const Index count = std::min(LANES<S>, hidden - j);
                sums += absolute<S>(load(a2 + i * hidden + j, count));
            }
            const double sum = sum_of_lanes<S>(sums);
            largest = sum <= largest ? largest : sum;
        }
        const double halvings = std::ceil(std::log2(std::sqrt(largest) / call.polynomial[8]));
        call.squarings = std::isfinite(halvings) ? Index(std::max(0.0, halvings)) : 0;
    }

    void forward() const {
        const S half = scale();
        combine(a, {{{half, a}}});
        combine(a2, {{{half * half, a2}}});
        combine(inner, {{{1, a2}, {x2, a}}});
        add_to_diagonal(inner, x1);
        multiply(left, 1, a2, inner);
        combine(right, {{{1, left}, {x4, a}, {x5, a2}}});
        add_to_diagonal(right, x3);
        multiply(power(0), y3, left, right, {{{y1, a}, {y2, a2}}});
        add_to_diagonal(power(0), 1);
        for (Index k = 0; k < call.squarings; k++) multiply(power(k + 1), 1, power(k), power(k));
    }

    // On transposed gradients: the adjoint at S is the derivative at S in the direction of the transposed gradient.
    void backward() const {
        S *room = static_cast<S *>(call.room), *grad = room + call.squarings % 2 * size, *d_right = room + 2 * size;
        S *d_left = room + 3 * size, *d_inner = room + 4 * size, *d_a2 = room + 5 * size, *both = d_left, *d_a = d_a2;
        transpose(grad, static_cast<const S *>(call.grad_rotation));
        for (Index k = call.squarings - 1; k >= 0; k--) {  // Y = X X
            S *next = room + k % 2 * size;
            multiply(next, 1, power(k), grad);
            multiply(next, 1, grad, power(k), {{{1, next}}});
            grad = next;
        }
        multiply(d_right, y3, grad, left);
        multiply(d_left, y3, right, grad, {{{1, d_right}}});
        multiply(d_inner, 1, d_left, a2);
        multiply(d_a2, 1, inner, d_left, {{{1, d_inner}, {y2, grad}, {x5, d_right}}});
        transpose(both, d_a2);
        combine(both, {{{1, both}, {1, d_a2}}});
        multiply(d_a, 1, a, both, {{{y1, grad}, {x4, d_right}, {x2, d_inner}}});
        transpose(both, d_a);
        combine(both, {{{scale(), both}, {-scale(), d_a}}});
        S *above = static_cast<S *>(call.d_logarithm);
        for (Index i = 0; i < hidden; i++) above = std::copy_n(both + i * (hidden + 1) + 1, hidden - i - 1, above);
    }

private:
    struct Term {
        S factor;
        const S *matrix;  // null: there is no such term
    };
    using Terms = std::array<Term, 3>;

    S scale() const { return std::ldexp(S(1), -int(call.squarings)); }

    // Y after k squarings; the last one is W
    S *power(Index k) const { return k == call.squarings ? static_cast<S *>(call.rotation) : right + (k + 1) * size; }

    void add_to_diagonal(S *matrix, S number) const {
        for (Index i = 0; i < size; i += hidden + 1) matrix[i] += number;
    }

    // to = fromᵀ, block by block: a column-wise access still uses the whole of each cache line.
    void transpose(S *to, const S *from) const {
        constexpr Index block = 16;
        share_rows(call, (hidden + block - 1) / block, [&](Index first, Index end) {
            for (Index top = first * block; top < std::min(end * block, hidden); top += block)
                for (Index start = 0; start < hidden; start += block)
                    for (Index i = top; i < std::min(top + block, hidden); i++)
                        for (Index j = start; j < std::min(start + block, hidden); j++)
                            to[j * hidden + i] = from[i * hidden + j];
        });
    }

    static Vector<S> sum(const Terms &terms, Index place, Index count) {
        Vector<S> sum = {};
        for (const Term &term : terms)
            if (term.matrix) sum += term.factor * load(term.matrix + place, count);
        return sum;
    }

    // to = Σ terms
    void combine(S *to, const Terms &terms) const {
        share_rows(call, hidden, [&](Index first, Index end) {
            for (Index place = first * hidden; place < end * hidden; place += LANES<S>) {
                const Index count = std::min(LANES<S>, end * hidden - place);
                store(to + place, sum(terms, place, count), count);
            }
        });
    }

    // to = factor · x · y + Σ terms
    void multiply(S *to, S factor, const S *x, const S *y, const Terms &terms = {}) const {
        const Packed<S> packed(y, hidden, 1, hidden, hidden);
        share_rows(call, hidden, [&](Index first, Index end) {
            const Index start = first * hidden;
            Streams<S> streams = {{{to + start, hidden}}};
            for (Index i = 0; i < Index(terms.size()); i++)
                if (terms[i].matrix) streams[i + 1] = {terms[i].matrix + start, hidden};
            product(packed, x + start, hidden, end - first, streams,
                    [&](Index row, Index column, Index vectors, const S *products) {
                        for_each_vector<S>(column, vectors, hidden, [&](Index offset, Index c, Index n) {
                            const Index place = start + row * hidden + c;
                            store(to + place, factor * load(products + offset) + sum(terms, place, n), n);
                        });
                    });
        });
    }

    const Call &call;
    const Index hidden, size;
    S *const a, *const a2, *const inner, *const left, *const right;
    S x1, x2, x3, x4, x5, y1, y2, y3;
};

template <class S>
void run_square(const Call &call) { Exponential<S>(call).square(); }
template <class S>
void run_exponential(const Call &call) { Exponential<S>(call).forward(); }
template <class S>
void run_exponential_backward(const Call &call) { Exponential<S>(call).backward(); }

// 0: done. 1: out of memory.
int enter(void (*run)(const Call &), const Call &call) {
    try {
        run(call);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

template <class S>
double smallest(const S *numbers, Index count) {
    double least = std::numeric_limits<double>::infinity();
    for (Index t = 0; t < count; t++) least = std::min(least, double(numbers[t] < 0 ? -numbers[t] : numbers[t]));
    return least;
}

// As many independent chains of multiply-adds as a tile has sums, and nothing else: no memory, no waiting. Nothing that
// is computed on this core can be faster.
template <class S>
double multiply_adds(Index rounds) {
    volatile S factor = S(0.5), summand = S(1);  // the compiler cannot know them
    const Vector<S> a = factor - Vector<S>{}, b = summand - Vector<S>{};
    Vector<S> sums[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = S(r * TILE_VECTORS + v) - Vector<S>{};
    for (Index round = 0; round < rounds; round++)
        for (int r = 0; r < TILE_ROWS; r++)
            for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = sums[r][v] * a + b;
    Vector<S> all = {};
    for (int r = 0; r < TILE_ROWS; r++)
        for (int v = 0; v < TILE_VECTORS; v++) all += sums[r][v];
    volatile double used = sum_of_lanes<S>(all);
    (void)used;
    return 2.0 * double(LANES<S>) * TILE_ROWS * TILE_VECTORS * double(rounds);
}

}  // namespace

int stair_forward(const Call *call) { return enter(run<FORWARD, STAIR_SCALAR>, *call); }
int stair_backward(const Call *call) { return enter(run<BACKWARD, STAIR_SCALAR>, *call); }
int stair_states(const Call *call) { return enter(run<STATES, STAIR_SCALAR>, *call); }
int stair_kernel_gradient(const Call *call) { return enter(run_kernel_gradient<STAIR_SCALAR>, *call); }
int stair_square(const Call *call) { return enter(run_square<STAIR_SCALAR>, *call); }
int stair_exponential(const Call *call) { return enter(run_exponential<STAIR_SCALAR>, *call); }
int stair_exponential_backward(const Call *call) { return enter(run_exponential_backward<STAIR_SCALAR>, *call); }
double stair_smallest(const void *numbers, std::int64_t count) {
    return smallest(static_cast<const STAIR_SCALAR *>(numbers), count);
}
double stair_multiply_adds(std::int64_t rounds) { return multiply_adds<STAIR_SCALAR>(rounds); }
