// The convolution kernels of every instruction set that this CPU supports, against reference.h.
#include <algorithm>

#include "conv_plan.h"
#include "kernels_test.h"

namespace sparsetrain {
namespace test {
namespace {

constexpr Parallel kPair{run_in_reverse, 2};
constexpr Parallel kReversed{run_in_reverse, 9};
constexpr Parallel kThreaded{run_on_threads, 9};

// Which ways of sharing out work the cases took (see conv_product and conv_gradients).
struct Ways {
  int64_t whole_strips = 0, shared_strips = 0, one_round = 0, more_rounds = 0, few_pixels = 0;
} ways;

// ---- shapes -------------------------------------------------------------------------------------

// out_channels is -k for k per input channel, in as many groups: a depthwise convolution.
ConvShape make_shape(int64_t batch, int64_t in_channels, int64_t height, int64_t width,
                     int64_t out_channels, int64_t kernel_y, int64_t kernel_x) {
  ConvShape s{};
  s.batch = batch;
  s.groups = out_channels < 0 ? in_channels : 1;
  s.in_channels = in_channels;
  s.out_channels = out_channels < 0 ? -out_channels * in_channels : out_channels;
  s.in_size[0] = height;
  s.in_size[1] = width;
  s.kernel[0] = kernel_y;
  s.kernel[1] = kernel_x;
  for (int d = 0; d < 2; d++) s.stride[d] = s.dilation[d] = 1;
  return s;
}

struct Chosen {
  ConvShape shape;
  double density = 0.5;
  Chosen& stride(int64_t y, int64_t x) { return set(shape.stride, y, x); }
  Chosen& padding(int64_t y, int64_t x) { return set(shape.padding, y, x); }
  Chosen& dilation(int64_t y, int64_t x) { return set(shape.dilation, y, x); }
  Chosen& groups(int64_t n) {
    shape.groups = n;
    return *this;
  }
  Chosen& at(double new_density) {
    density = new_density;
    return *this;
  }

 private:
  Chosen& set(int64_t* pair, int64_t y, int64_t x) {
    pair[0] = y;
    pair[1] = x;
    return *this;
  }
};

// Fills in out_size; false if the kernel does not fit into the padded image.
bool finish(ConvShape* s) {
  for (int d = 0; d < 2; d++) {
    const int64_t room = s->in_size[d] + 2 * s->padding[d] - s->dilation[d] * (s->kernel[d] - 1);
    if (room < 1) return false;
    s->out_size[d] = (room - 1) / s->stride[d] + 1;
  }
  return true;
}

int64_t columns(const ConvShape& s) { return s.in_channels / s.groups * s.kernel[0] * s.kernel[1]; }
// At most, since padding is skipped.
double count_products(const ConvShape& s, double density) {
  return density * static_cast<double>(s.out_channels * columns(s)) *
         static_cast<double>(s.batch * s.out_size[0] * s.out_size[1]);
}

std::string name_of(const ConvShape& s) {
  auto pair = [](const int64_t* p) { return std::to_string(p[0]) + "x" + std::to_string(p[1]); };
  return std::to_string(s.batch) + " x " + std::to_string(s.in_channels) + " x " + pair(s.in_size) +
         " -> " + std::to_string(s.out_channels) + " kernel " + pair(s.kernel) + " stride " +
         pair(s.stride) + " padding " + pair(s.padding) + " dilation " + pair(s.dilation) +
         " groups " + std::to_string(s.groups);
}

// ---- all operators on one shape -----------------------------------------------------------------

struct Arrays {
  std::shared_ptr<Input> x, dy, values, bias;
  Arrays(Random* random, Fill kind, DType dtype, const Pattern& p, const ConvShape& s)
      : x(random_array(random, kind, dtype, reference::count_x(s))),
        dy(random_array(random, kind, dtype, reference::count_y(s))),
        values(random_array(random, kind, dtype, p.nnz)),
        bias(random_array(random, kind, dtype, s.out_channels)) {}
};

struct Results {
  std::vector<reference::Sum> y, y0, dx, dvalues, dbias;
  Results(DType dtype, const Pattern& p, const ConvShape& s, const Arrays& a)
      : y(reference::conv_forward(dtype, p, s, a.x->data(), a.values->data(), a.bias->data())),
        dx(reference::conv_grad_input(dtype, p, s, a.dy->data(), a.values->data())),
        dvalues(reference::conv_grad_values(dtype, p, s, a.dy->data(), a.x->data())),
        dbias(reference::conv_grad_bias(dtype, s, a.dy->data())) {
    if (p.nnz < 2000)
      y0 = reference::conv_forward(dtype, p, s, a.x->data(), a.values->data(), nullptr);
  }
};

void test_table(const Case& c, const Plan* plan, const ConvShape& s, const Arrays& a,
                const Results& r, const std::vector<Parallel>& parallels) {
  const KernelTable& table = *c.table;
  const DType dtype = c.dtype;
  // body(), counting how often it asked for threads
  auto counted = [](const Parallel& parallel, const std::function<void()>& body) {
    const int64_t before = runs;
    body();
    return parallel.threads > 1 ? runs - before : 0;
  };
  auto forward = [&](const void* bias, void* out, const Parallel& parallel) {
    const int64_t regions = counted(parallel, [&] {
      table.conv_forward({dtype, plan, s, a.x->data(), a.values->data(), bias, out, parallel});
    });
    ways.whole_strips += regions == 1;
    ways.shared_strips += regions == 2;
  };
  auto backward = [&](void* dx, void* dvalues, void* dbias, const Parallel& parallel) {
    const int64_t regions = counted(parallel, [&] {
      table.conv_backward({dtype, plan, s, a.dy->data(), dvalues ? a.x->data() : nullptr,
                           dx ? a.values->data() : nullptr, dx, dvalues, dbias, parallel});
    });
    if (dx || dbias) return;
    ways.one_round += regions == 2;
    ways.more_rounds += regions > 2;
  };

  check_kernel(c, "conv_forward", r.y, parallels, [&](void* out, const Parallel& parallel) {
    forward(a.bias->data(), out, parallel);
  });
  if (!r.y0.empty())
    check_kernel(c, "conv_forward_no_bias", r.y0, {},
                 [&](void* out, const Parallel& parallel) { forward(nullptr, out, parallel); });
  // Each result alone, then all at once: the bytes must be the same.
  Output dx_out(dtype, r.dx.size()), dvalues_out(dtype, r.dvalues.size());
  Output dbias_out(dtype, r.dbias.size());
  check_kernel(c, "conv_grad_input", r.dx, parallels, [&](void* out, const Parallel& parallel) {
    backward(out, nullptr, nullptr, parallel);
    std::memcpy(dx_out.data(), out, dx_out.bytes());
  });
  check_kernel(c, "conv_grad_values", r.dvalues, parallels,
               [&](void* out, const Parallel& parallel) {
                 backward(nullptr, out, nullptr, parallel);
                 std::memcpy(dvalues_out.data(), out, dvalues_out.bytes());
               });
  check_kernel(c, "conv_grad_bias", r.dbias, {parallels.front()},
               [&](void* out, const Parallel& parallel) {
                 Output dvalues_too(dtype, r.dvalues.size());
                 backward(nullptr, dvalues_too.data(), out, parallel);
                 check(dvalues_too.same_bytes(dvalues_out), c.text("conv_grad_values with bias"));
                 std::memcpy(dbias_out.data(), out, dbias_out.bytes());
               });
  for (const Parallel& parallel : {kSerial, parallels.back()}) {
    Output dx(dtype, r.dx.size()), dvalues(dtype, r.dvalues.size()), dbias(dtype, r.dbias.size());
    backward(dx.data(), dvalues.data(), dbias.data(), parallel);
    check(dx.same_bytes(dx_out) && dvalues.same_bytes(dvalues_out) && dbias.same_bytes(dbias_out) &&
              dx.guards_intact() && dvalues.guards_intact() && dbias.guards_intact(),
          c.text("conv_all_gradients") + ": not what each gives alone");
  }
}

// One plan for all calls, as in training: instruction sets and dtypes replace each other in it.
void test_conv(const TestPattern& pattern, const Plan* plan, const ConvShape& s, DType dtype,
               Fill kind, Random* random) {
  const Pattern& p = pattern.view;
  const Arrays arrays(random, kind, dtype, p, s);
  const Results results(dtype, p, s, arrays);
  std::vector<Parallel> parallels{kReversed};
  const double density = static_cast<double>(p.nnz) / static_cast<double>(p.rows * p.cols);
  if (count_products(s, density) > 400000) parallels = {kReversed, kPair, kThreaded};
  for (int64_t lanes : {4, 8, 16})  // without sharing: as a linear layer of the unfolded input
    ways.few_pixels += samples_are_pixels(p.nnz, s, {lanes, 4, 4, 8});
  const std::string name = name_of(s) + " nonzeros " + std::to_string(p.nnz);
  for (const KernelTable* const* t = kKernelTables; *t; t++)
    if ((*t)->supported()) test_table({*t, dtype, kind, name}, plan, s, arrays, results, parallels);
}

constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16};

// ---- random and chosen shapes -------------------------------------------------------------------

template <class T, size_t N>
T pick(Random* random, const T (&from)[N]) {
  return from[random->next() % N];
}
int64_t between(Random* random, int64_t first, int64_t last) {
  return first + static_cast<int64_t>(random->next() % static_cast<uint64_t>(last - first + 1));
}

Chosen random_shape(Random* random, double most_products) {
  static const int64_t batches[] = {0, 1, 1, 2, 7, 8, 16, 17, 33};
  static const int64_t sizes[][2] = {{1, 1},   {1, 40},  {33, 1}, {7, 7},
                                     {14, 14}, {28, 28}, {15, 57}};
  static const double densities[] = {0, 0.05, 0.5, 1};
  for (;;) {
    const int64_t* size = sizes[random->next() % 7];
    const bool any_size = random->next() % 3 == 0;
    const int64_t groups = random->next() % 3 ? 1 : between(random, 1, 3);
    const bool depthwise = random->next() % 8 == 0;
    Chosen c{
        make_shape(pick(random, batches), groups * between(random, 1, 70 / groups),
                   any_size ? between(random, 1, 24) : size[0],
                   any_size ? between(random, 1, 40) : size[1],
                   depthwise ? -between(random, 1, 2) : groups * between(random, 1, 70 / groups),
                   between(random, 1, 4), between(random, 1, 4)),
        pick(random, densities)};
    ConvShape& s = c.shape;
    if (!depthwise) s.groups = groups;
    const bool pointwise = random->next() % 6 == 0, unit_stride = random->next() % 2;
    for (int d = 0; d < 2; d++) {
      if (pointwise) s.kernel[d] = 1;
      s.stride[d] = unit_stride ? 1 : between(random, 1, 3);
      s.padding[d] = pointwise && random->next() % 2 ? 0 : between(random, 0, 3);
      s.dilation[d] = between(random, 1, 2);
    }
    if (finish(&s) && count_products(s, c.density) <= most_products) return c;
  }
}

void random_shapes(bool quick) {
  Random random{11};
  for (int i = 0; i < (quick ? 150 : 400); i++) {
    const Chosen c = random_shape(&random, i % 8 ? 1e5 : 1e6);
    const ConvShape& s = c.shape;
    const TestPattern pattern(&random, s.out_channels, columns(s), c.density, i % 5 == 4);
    const PlanPtr plan = make_plan(pattern);
    for (int d = 0; d < 3; d++) {
      if (quick && i % 3 != d) continue;
      test_conv(pattern, plan.get(), s, kDTypes[d],
                i % 2 ? Fill::signed_uniform : Fill::small_integers, &random);
    }
  }
}

std::vector<Chosen> chosen_shapes(bool quick) {
  auto conv = [](int64_t batch, int64_t in, int64_t height, int64_t width, int64_t out, int64_t ky,
                 int64_t kx) { return Chosen{make_shape(batch, in, height, width, out, ky, kx)}; };
  std::vector<Chosen> shapes{
      // One strip, or a few: workers share their rows and adjacent ranges of channels.
      conv(1, 70, 14, 14, 64, 3, 3).padding(1, 1).at(0.15),
      conv(2, 33, 15, 57, 40, 3, 3).padding(1, 1).at(0.05),
      conv(7, 70, 7, 7, 50, 3, 3).padding(1, 1).at(0.1),
      conv(1, 50, 28, 28, 70, 1, 1),
      conv(2, 40, 28, 28, 60, 3, 3).stride(2, 2).padding(1, 1).at(0.2),
      conv(1, 51, 15, 57, 33, 2, 4).stride(1, 3).padding(1, 3).groups(3).at(0.3),
      // Few pixels, as linear layers of the unfolded input: one tile and several, tiles that begin
      // inside an image, steps of 1, 2 and 3 columns, images that padding exceeds.
      conv(1, 40, 7, 7, 70, 3, 3).padding(1, 1),
      conv(1, 33, 14, 14, 120, 3, 3).stride(2, 2).padding(1, 1).at(0.4),
      conv(1, 20, 14, 14, 130, 3, 3).padding(1, 1).at(1),
      conv(3, 30, 7, 7, 90, 3, 3).padding(1, 1).at(0.7),
      // Folded in several rounds, a channel's kernel positions across two of them.
      conv(1, 72, 28, 28, 20, 3, 3).padding(1, 1).at(0.8),
      conv(1, 44, 27, 50, 30, 3, 5).stride(1, 2).padding(1, 2).at(0.9),
      conv(1, 3, 33, 33, 20, 9, 9).padding(4, 4).at(0.9),  // a channel across three
      conv(2, 20, 13, 14, 90, 2, 3).stride(2, 3).padding(1, 3).dilation(1, 2).at(0.6),
      conv(2, 15, 11, 33, 100, 3, 4).stride(3, 2).padding(2, 0).at(0.6),
      conv(1, 12, 2, 3, 90, 3, 3).padding(3, 2).dilation(2, 1).at(0.6),
      conv(1, 200, 7, 7, 150, 1, 1),
      conv(2, 60, 9, 7, 90, 1, 1).stride(2, 2).padding(1, 0),
      // Many strips.
      conv(33, 20, 28, 28, 5, 3, 3).padding(1, 1).at(0.05),
      conv(33, 64, 14, 14, 20, 1, 1).at(0.15),
      conv(33, 17, 14, 14, -1, 3, 3).padding(1, 1),
      conv(17, 18, 28, 28, 8, 3, 3).stride(2, 2).padding(1, 1).at(0.25),
      conv(17, 70, 15, 57, 6, 1, 1).stride(2, 2).at(0.5),
      conv(33, 16, 14, 14, 34, 1, 1).stride(3, 2).at(0.7),
      // Samples as lanes, several strips of an image.
      conv(8, 70, 28, 28, 5, 3, 3).padding(1, 1).at(0.05),
      conv(16, 66, 29, 31, 5, 3, 3).stride(2, 2).padding(1, 1).at(0.05),
      conv(8, 5, 31, 30, 66, 3, 2).stride(2, 1).padding(2, 0).dilation(1, 2).at(0.05),
      // Kernels smaller than the stride: pixels that no kernel position reaches.
      conv(2, 5, 9, 11, 7, 1, 2).stride(3, 3),
      conv(3, 4, 8, 7, 4, 2, 1).stride(2, 3).padding(1, 0).at(1),
      // Kernels larger than the image; results of padding only.
      conv(7, 3, 1, 1, 5, 3, 3).padding(1, 1).at(1),
      conv(2, 3, 1, 2, 4, 4, 4).padding(3, 3).dilation(1, 2).at(1),
      conv(2, 3, 2, 1, 4, 1, 1).padding(3, 3).stride(2, 1).at(1),
      // More than 65536 vectors of copies: 32-bit operands, in either direction.
      conv(1, 2600, 1, 100, 8, 1, 3).padding(0, 1).at(0.02),
      conv(1, 8, 1, 100, 2600, 1, 3).padding(0, 1).at(0.02),
      // Several column blocks.
      conv(3, 300, 7, 7, 12, 3, 3).padding(1, 1).at(0.2),
      // Samples as lanes, results past the caches, in each direction; pairs of phases past them.
      conv(8, 2, 112, 112, 12, 3, 3).padding(1, 1).at(0.1),
      conv(8, 12, 112, 112, 2, 3, 3).padding(1, 1).at(0.1),
      conv(8, 12, 112, 112, 2, 3, 3).stride(2, 2).padding(1, 1).at(0.1),
      conv(3, 34, 112, 112, 2, 1, 1).stride(2, 2).at(0.5),
      // 1x1, tile by tile: rows are output channels, input channels, one for each pass; gathered
      // and
      // scattered; images that are whole vectors, that end in an overlapping one, that are one
      // vector or less; several groups of tiles; results past the caches in each direction; a tile
      // that L1 does not hold, of a sparse and of a dense pattern.
      conv(3, 12, 28, 28, 40, 1, 1).at(0.1),
      conv(3, 40, 28, 28, 12, 1, 1).at(0.1),
      conv(2, 24, 24, 32, 24, 1, 1).at(0.02),
      conv(2, 30, 20, 24, 21, 1, 1).at(1),
      conv(9, 33, 13, 15, 50, 1, 1).at(0.05),
      conv(9, 50, 7, 7, 33, 1, 1).at(0.12),
      conv(17, 20, 3, 3, 30, 1, 1).at(0.06),
      conv(17, 30, 5, 5, 20, 1, 1).at(0.12),
      conv(16, 20, 4, 2, 30, 1, 1),
      conv(3, 4, 112, 112, 32, 1, 1).at(0.1),
      conv(3, 32, 112, 112, 4, 1, 1).at(0.1),
      conv(2, 300, 12, 12, 280, 1, 1).at(0.03),
      conv(2, 210, 8, 12, 220, 1, 1).at(0.2),
      conv(1, 520, 9, 16, 8, 1, 1).at(0.3),
      // Pairs of phases: one row, odd sizes, parts of rows in a strip.
      conv(2, 9, 1, 301, 7, 1, 3).stride(1, 2).at(0.5),
      conv(1, 5, 3, 1501, 6, 1, 1).stride(2, 2).at(0.5),
      conv(2, 5, 9, 11, 7, 1, 2).stride(2, 2),
  };
  if (!quick) {
    // Outputs that are written past the caches, in each direction.
    shapes.push_back(conv(3, 2, 150, 157, 34, 3, 3).padding(1, 1).at(0.1));
    shapes.push_back(conv(3, 34, 150, 157, 2, 3, 3).padding(1, 1).at(0.1));
    shapes.push_back(conv(3, 34, 151, 157, 2, 3, 3).stride(2, 2).padding(1, 1).at(0.2));
    shapes.push_back(conv(2, 64, 56, 56, 64, 3, 3).padding(1, 1).at(0.05));
  }
  return shapes;
}

void chosen(bool quick) {
  Random random{12};
  for (Chosen& c : chosen_shapes(quick)) {
    ConvShape& s = c.shape;
    if (!check(finish(&s), "chosen shape does not fit: " + name_of(s))) continue;
    const TestPattern pattern(&random, s.out_channels, columns(s), c.density, false);
    const PlanPtr plan = make_plan(pattern);
    for (DType dtype : kDTypes) {
      test_conv(pattern, plan.get(), s, dtype, Fill::signed_uniform, &random);
      if (!quick) test_conv(pattern, plan.get(), s, dtype, Fill::small_integers, &random);
    }
  }
}

// ---- single properties --------------------------------------------------------------------------

// NaN and infinity in one image stay in that image, and reach every result they should.
void non_finite_images_stay_alone() {
  Random random{13};
  ConvShape s = make_shape(7, 3, 5, 6, 4, 3, 3);
  s.padding[0] = s.padding[1] = 1;
  finish(&s);
  const TestPattern pattern(&random, s.out_channels, columns(s), 1.0, false);
  const Pattern& p = pattern.view;
  const PlanPtr plan = make_plan(pattern);
  const int64_t pixels = 30, bad = 4;
  for (DType dtype : kDTypes) {
    const Arrays a(&random, Fill::signed_uniform, dtype, p, s);
    const double infinity = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < 3 * pixels; i++)
      write(dtype, a.x->data(), bad * 3 * pixels + i, infinity);
    for (int64_t i = 0; i < 4 * pixels; i++)
      write(dtype, a.dy->data(), bad * 4 * pixels + i, infinity);
    for (const KernelTable* const* t = kKernelTables; *t; t++) {
      if (!(*t)->supported()) continue;
      const int64_t ys = reference::count_y(s), xs = reference::count_x(s);
      Output y(dtype, ys), dx(dtype, xs);
      (*t)->conv_forward(
          {dtype, plan.get(), s, a.x->data(), a.values->data(), a.bias->data(), y.data(), kSerial});
      (*t)->conv_backward({dtype, plan.get(), s, a.dy->data(), nullptr, a.values->data(), dx.data(),
                           nullptr, nullptr, kSerial});
      bool ok = true;
      for (int64_t i = 0; i < ys; i++)
        ok &= std::isfinite(reference::read(dtype, y.data(), i)) == (i / (4 * pixels) != bad);
      for (int64_t i = 0; i < xs; i++)
        ok &= std::isfinite(reference::read(dtype, dx.data(), i)) == (i / (3 * pixels) != bad);
      check(ok,
            std::string("non_finite_images_stay_alone ") + (*t)->isa + " " + test::name_of(dtype));
    }
  }
}

// Threads may use one plan at once, with shapes that replace each other, and ask for its size.
void a_plan_is_shared_between_shapes() {
  Random random{14};
  const TestPattern pattern(&random, 6, 5 * 9, 0.5, false);
  const KernelTable* table = select_kernels(nullptr);
  struct Call {
    ConvShape s;
    Arrays a;
    Output y, dx;
  };
  std::vector<std::unique_ptr<Call>> calls;
  const PlanPtr own = make_plan(pattern), shared = make_plan(pattern);
  auto run = [&](const Plan* plan, const Call& c, Output* y, Output* dx) {
    table->conv_forward({DType::f32, plan, c.s, c.a.x->data(), c.a.values->data(), c.a.bias->data(),
                         y->data(), kSerial});
    table->conv_backward({DType::f32, plan, c.s, c.a.dy->data(), nullptr, c.a.values->data(),
                          dx->data(), nullptr, nullptr, kSerial});
  };
  for (int64_t size : {3, 8, 13}) {
    ConvShape s = make_shape(size / 2, 5, size, size + 3, 6, 3, 3);
    s.stride[1] = 1 + size % 2;
    finish(&s);
    calls.push_back(std::make_unique<Call>(Call{
        s, Arrays(&random, Fill::signed_uniform, DType::f32, pattern.view, s),
        Output(DType::f32, reference::count_y(s)), Output(DType::f32, reference::count_x(s))}));
    run(own.get(), *calls.back(), &calls.back()->y, &calls.back()->dx);
  }
  std::vector<std::thread> threads;
  bool ok[3] = {true, true, true};
  for (size_t i = 0; i < 3; i++) {
    threads.emplace_back([&, i] {
      const Call& c = *calls[i];
      for (int repeat = 0; repeat < 50; repeat++) {
        Output y(DType::f32, reference::count_y(c.s)), dx(DType::f32, reference::count_x(c.s));
        run(shared.get(), c, &y, &dx);
        ok[i] &= y.same_bytes(c.y) && dx.same_bytes(c.dx) && plan_bytes(shared.get()) > 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check(ok[0] && ok[1] && ok[2], "a_plan_is_shared_between_shapes");
}

// A test that cannot fail proves nothing: one wrong nonzero must be noticed.
void a_corrupted_nonzero_is_noticed() {
  Random random{15};
  ConvShape s = make_shape(2, 5, 7, 6, 4, 3, 2);
  finish(&s);
  const TestPattern pattern(&random, s.out_channels, columns(s), 0.5, false);
  const PlanPtr plan = make_plan(pattern);
  for (DType dtype : kDTypes) {
    const Arrays a(&random, Fill::signed_uniform, dtype, pattern.view, s);
    const Results r(dtype, pattern.view, s, a);
    write(dtype, a.values->data(), 5, reference::read(dtype, a.values->data(), 5) + 0.5);
    Output y(dtype, r.y.size()), dx(dtype, r.dx.size());
    const KernelTable* table = select_kernels(nullptr);
    table->conv_forward(
        {dtype, plan.get(), s, a.x->data(), a.values->data(), a.bias->data(), y.data(), kSerial});
    table->conv_backward({dtype, plan.get(), s, a.dy->data(), nullptr, a.values->data(), dx.data(),
                          nullptr, nullptr, kSerial});
    check(first_wrong(dtype, Fill::signed_uniform, r.y, y.data()) >= 0 &&
              first_wrong(dtype, Fill::signed_uniform, r.dx, dx.data()) >= 0,
          std::string("a_corrupted_nonzero_is_noticed (convolution) ") + test::name_of(dtype));
  }
}

}  // namespace

void test_convolutions(bool quick) {
  a_corrupted_nonzero_is_noticed();
  non_finite_images_stay_alone();
  a_plan_is_shared_between_shapes();
  random_shapes(quick);
  chosen(quick);
  const bool all = ways.whole_strips && ways.shared_strips && ways.one_round && ways.more_rounds &&
                   ways.few_pixels > 50;
  check(all, "some way of computing convolutions was never taken");
  std::printf(
      "convolutions shared out: whole strips %lld, parts of strips %lld; gradients of "
      "values in one round %lld, in more %lld; unfolded %lld\n",
      static_cast<long long>(ways.whole_strips), static_cast<long long>(ways.shared_strips),
      static_cast<long long>(ways.one_round), static_cast<long long>(ways.more_rounds),
      static_cast<long long>(ways.few_pixels));
}

}  // namespace test
}  // namespace sparsetrain
