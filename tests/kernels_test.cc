// Every kernel of every instruction set that this CPU supports, against reference.h.
//   kernels_test           all shapes
//   kernels_test --quick   without the largest ones (for emulators and sanitizers)
// Needs no torch. Prints each failure and a closing line; returns 1 if anything failed.
#include "kernels_test.h"
#include "scratch.h"
#include "topology.h"

namespace {

using namespace sparsetrain;
using namespace sparsetrain::test;

constexpr Parallel kReversed{run_in_reverse, 3};
constexpr Parallel kThreaded{run_on_threads, 3};

// ---- all operators on one shape -----------------------------------------------------------------

struct Shape {
  const TestPattern& pattern;
  const Plan* plan;
  int64_t batch, gap;
  std::string name;
};

void test_linear(const Shape& s, DType dtype, Fill kind, Random* random) {
  const Pattern& p = s.pattern.view;
  const RandomMatrix x(random, kind, dtype, s.batch, p.cols, s.gap);
  const RandomMatrix dy(random, kind, dtype, s.batch, p.rows, 2 * s.gap);
  const auto values = random_array(random, kind, dtype, p.nnz);
  const auto bias = random_array(random, kind, dtype, p.rows);
  const auto y = reference::linear_forward(dtype, p, x.view, values->data(), bias->data());
  const auto y0 = reference::linear_forward(dtype, p, x.view, values->data(), nullptr);
  const auto dx = reference::linear_grad_input(dtype, p, dy.view, values->data());
  const auto dvalues = reference::linear_grad_values(dtype, p, dy.view, x.view);
  const auto dbias = reference::linear_grad_bias(dtype, dy.view);
  const std::vector<Parallel> reversed{kReversed};
  std::vector<Parallel> threads = reversed;
  if (kind == Fill::signed_uniform && p.nnz * s.batch > 200000) threads.push_back(kThreaded);

  for (const KernelTable* const* t = kKernelTables; *t; t++) {
    if (!(*t)->supported()) continue;
    const Case c{*t, dtype, kind, s.name};
    check_kernel(c, "forward", y, threads, [&](void* out, const Parallel& parallel) {
      (*t)->linear_forward({dtype, s.plan, x.view, values->data(), bias->data(), out, parallel});
    });
    check_kernel(c, "forward_no_bias", y0, reversed, [&](void* out, const Parallel& parallel) {
      (*t)->linear_forward({dtype, s.plan, x.view, values->data(), nullptr, out, parallel});
    });
    auto backward = [&](void* dx_out, void* dvalues_out, void* dbias_out,
                        const Parallel& parallel) {
      (*t)->linear_backward({dtype, s.plan, dy.view, dvalues_out ? x.view : Matrix{},
                             dx_out ? values->data() : nullptr, dx_out, dvalues_out, dbias_out,
                             parallel});
    };
    // Each result alone, then all at once: the bytes must be the same.
    Output dx_out(dtype, dx.size()), dvalues_out(dtype, dvalues.size());
    Output dbias_out(dtype, dbias.size());
    check_kernel(c, "grad_input", dx, threads, [&](void* out, const Parallel& parallel) {
      backward(out, nullptr, nullptr, parallel);
      std::memcpy(dx_out.data(), out, dx_out.bytes());
    });
    check_kernel(c, "grad_values", dvalues, threads, [&](void* out, const Parallel& parallel) {
      backward(nullptr, out, nullptr, parallel);
      std::memcpy(dvalues_out.data(), out, dvalues_out.bytes());
    });
    check_kernel(c, "grad_bias", dbias, threads, [&](void* out, const Parallel& parallel) {
      Output dvalues_too(dtype, dvalues.size());
      backward(nullptr, dvalues_too.data(), out, parallel);
      std::memcpy(dbias_out.data(), out, dbias_out.bytes());
    });
    for (const Parallel& parallel : {kSerial, kReversed}) {
      Output a(dtype, dx.size()), b(dtype, dvalues.size()), d(dtype, dbias.size());
      backward(a.data(), b.data(), d.data(), parallel);
      check(a.same_bytes(dx_out) && b.same_bytes(dvalues_out) && d.same_bytes(dbias_out) &&
                a.guards_intact() && b.guards_intact() && d.guards_intact(),
            c.text("all_gradients") + ": not what each gives alone");
    }
  }
}

void test_shape(const TestPattern& pattern, const char* what, bool all_batches, Random* random) {
  const PlanPtr plan = make_plan(pattern);
  for (int64_t batch : {0, 1, 2, 4, 7, 8, 15, 16, 17, 63, 64, 65, 130}) {
    if (!all_batches && batch != 1 && batch != 17 && batch != 130) continue;
    const bool few = batch == 2 || batch == 4 || batch == 8;  // float32 has kernels for these
    const int64_t gap = batch % 2 ? 3 : 0;
    const Shape shape{pattern, plan.get(), batch, gap,
                      std::to_string(pattern.view.rows) + "x" + std::to_string(pattern.view.cols) +
                          " " + what + " batch " + std::to_string(batch)};
    for (DType dtype : {DType::f32, DType::f64, DType::bf16}) {
      if (few && dtype != DType::f32) continue;
      test_linear(shape, dtype, Fill::signed_uniform, random);
      if (batch == 17) test_linear(shape, dtype, Fill::small_integers, random);
    }
  }
}

void all_shapes(bool quick) {
  Random random{1};
  for (int64_t rows : {0, 1, 3, 16, 17, 200, 400}) {
    for (int64_t cols : {0, 1, 3, 16, 17, 200, 400}) {
      const bool large = rows * cols >= 40000;
      if (large && quick && rows + cols != 600) continue;
      test_shape(TestPattern(&random, rows, cols, 0.0, false), "no_nonzeros", !large, &random);
      test_shape(TestPattern(&random, rows, cols, 0.1, true), "empty_rows", !large, &random);
      test_shape(TestPattern(&random, rows, cols, 0.5, false), "half", !large, &random);
      if (!(large && quick))
        test_shape(TestPattern(&random, rows, cols, 1.0, false), "full", !large, &random);
    }
  }
  // Several column blocks on either side.
  test_shape(TestPattern(&random, 130, 1100, 0.05, false), "many_columns", false, &random);
  test_shape(TestPattern(&random, 1100, 130, 0.05, false), "many_rows", false, &random);
  test_shape(TestPattern(&random, 20, 4200, 0.6, false), "many_dense_columns", false, &random);
  // As many tiles as workers, and one that is shared by two.
  const TestPattern wide(&random, 260, 400, 0.1, true);
  const PlanPtr wide_plan = make_plan(wide);
  for (int64_t batch : {48, 96, 160, 192})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16})
      test_linear({wide, wide_plan.get(), batch, 0, "260x400 batch " + std::to_string(batch)},
                  dtype, Fill::signed_uniform, &random);
  // Enough samples for several groups of sums, of tiles that no group divides evenly.
  const TestPattern pattern(&random, 70, 90, 0.2, true);
  const PlanPtr plan = make_plan(pattern);
  for (int64_t batch : {513, 1100})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16})
      test_linear({pattern, plan.get(), batch, 0, "70x90 batch " + std::to_string(batch)}, dtype,
                  Fill::signed_uniform, &random);
  // Enough tiles for values in the order of the sweeps, of several blocks and units; float64: with
  // rows in parts.
  const TestPattern sparse(&random, 200, 1500, 0.08, true);
  const PlanPtr sparse_plan = make_plan(sparse);
  for (int64_t batch : {513, 2100})
    for (DType dtype : {DType::f32, DType::f64, DType::bf16})
      test_linear({sparse, sparse_plan.get(), batch, 0, "200x1500 batch " + std::to_string(batch)},
                  dtype, Fill::signed_uniform, &random);
}

// Weights enough for several groups of rows in the gradient of the input.
void few_samples_in_groups() {
  Random random{5};
  const TestPattern pattern(&random, 1101, 603, 0.4, true);
  const PlanPtr plan = make_plan(pattern);
  for (int64_t batch : {1, 5})
    test_linear({pattern, plan.get(), batch, 0, "1101x603 batch " + std::to_string(batch)},
                DType::f32, Fill::signed_uniform, &random);
}

// Row numbers that need more than 16 bits, and columns at both ends.
void more_rows_than_16_bits() {
  Random random{2};
  const int64_t rows = 65537 + 20;
  std::vector<int32_t> crow(rows + 1, 0), col;
  for (int64_t r = 0; r < rows; r++) {
    if (r < 3 || r % 1000 == 1 || r >= 65530) {
      col.push_back(0);
      col.push_back(static_cast<int32_t>(1 + r % 7));
    }
    crow[r + 1] = static_cast<int32_t>(col.size());
  }
  const TestPattern pattern(std::move(crow), std::move(col), 8);
  const PlanPtr plan = make_plan(pattern);
  test_linear({pattern, plan.get(), 3, 0, "65557x8 batch 3"}, DType::f32, Fill::signed_uniform,
              &random);
}

// ---- single properties --------------------------------------------------------------------------

// NaN and infinity in one sample stay in that sample, and reach every result they should.
void non_finite_samples_stay_alone() {
  Random random{3};
  const TestPattern pattern(&random, 40, 30, 1.0, false);
  const Pattern& p = pattern.view;
  const PlanPtr plan = make_plan(pattern);
  const int64_t batch = 21, bad = 18;
  for (DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    RandomMatrix x(&random, Fill::signed_uniform, dtype, batch, p.cols, 0);
    RandomMatrix dy(&random, Fill::signed_uniform, dtype, batch, p.rows, 0);
    const auto values = random_array(&random, Fill::signed_uniform, dtype, p.nnz);
    write(dtype, x.input.data(), bad * p.cols + 29, std::numeric_limits<double>::infinity());
    write(dtype, dy.input.data(), bad * p.rows + 39, std::numeric_limits<double>::infinity());
    for (const KernelTable* const* t = kKernelTables; *t; t++) {
      if (!(*t)->supported()) continue;
      Output y(dtype, batch * p.rows), dx(dtype, batch * p.cols);
      (*t)->linear_forward({dtype, plan.get(), x.view, values->data(), nullptr, y.data(), kSerial});
      (*t)->linear_backward({dtype, plan.get(), dy.view, Matrix{}, values->data(), dx.data(),
                             nullptr, nullptr, kSerial});
      bool ok = true;
      for (int64_t i = 0; i < batch * p.rows; i++)
        ok &= std::isfinite(reference::read(dtype, y.data(), i)) == (i / p.rows != bad);
      for (int64_t i = 0; i < batch * p.cols; i++)
        ok &= std::isfinite(reference::read(dtype, dx.data(), i)) == (i / p.cols != bad);
      check(ok, std::string("non_finite_samples_stay_alone ") + (*t)->isa + " " + name_of(dtype));
    }
  }
}

// Two threads may use one new plan at once.
void a_plan_is_shared_between_threads() {
  Random random{4};
  const TestPattern pattern(&random, 60, 50, 0.3, false);
  const Pattern& p = pattern.view;
  const RandomMatrix dy(&random, Fill::signed_uniform, DType::f32, 5, p.rows, 0);
  const auto values = random_array(&random, Fill::signed_uniform, DType::f32, p.nnz);
  const KernelTable* table = select_kernels(nullptr);
  for (int repeat = 0; repeat < 20; repeat++) {
    const PlanPtr plan = make_plan(pattern);
    Output a(DType::f32, 5 * p.cols), b(DType::f32, 5 * p.cols);
    auto call = [&](Output* out) {
      table->linear_backward({DType::f32, plan.get(), dy.view, Matrix{}, values->data(),
                              out->data(), nullptr, nullptr, kSerial});
    };
    std::thread other(call, &b);
    call(&a);
    other.join();
    check(a.same_bytes(b), "a_plan_is_shared_between_threads");
  }
}

void faults_are_found() {
  struct Fault {
    std::vector<int32_t> crow, col;
    int64_t cols;
    PatternFault fault;
    int64_t where;
  };
  const Fault faults[] = {
      {{0, 2, 2, 4}, {0, 3, 1, 2}, 4, PatternFault::none, 0},
      {{0}, {}, 4, PatternFault::none, 0},
      {{0, 0, 0}, {}, 0, PatternFault::none, 0},
      {{1, 2, 2, 4}, {0, 3, 1, 2}, 4, PatternFault::crow_start, 0},
      {{0, 3, 2, 4}, {0, 1, 2, 3}, 4, PatternFault::crow_decreasing, 1},
      {{0, 9, 2, 4}, {0, 1, 2, 3}, 4, PatternFault::crow_decreasing, 1},
      {{0, -1, 2, 4}, {0, 1, 2, 3}, 4, PatternFault::crow_decreasing, 0},
      {{0, 2, 2, 3}, {0, 3, 1, 2}, 4, PatternFault::crow_end, 3},
      {{0, 2, 2, 5}, {0, 3, 1, 2}, 4, PatternFault::crow_end, 3},
      {{0, 2, 2, 4}, {0, 3, 1, 4}, 4, PatternFault::col_out_of_range, 3},
      {{0, 2, 2, 4}, {-1, 3, 1, 2}, 4, PatternFault::col_out_of_range, 0},
      {{0, 2, 2, 4}, {3, 0, 1, 2}, 4, PatternFault::col_unsorted, 1},
      {{0, 2, 2, 4}, {0, 3, 2, 2}, 4, PatternFault::col_duplicate, 3},
  };
  for (const Fault& f : faults) {
    const TestPattern pattern(f.crow, f.col, f.cols);
    const PatternCheck found = check_pattern(pattern.view);
    check(found.fault == f.fault && (f.fault == PatternFault::none || found.where == f.where),
          "faults_are_found: expected fault " + std::to_string(static_cast<int>(f.fault)) + " at " +
              std::to_string(f.where) + ", got " + std::to_string(static_cast<int>(found.fault)) +
              " at " + std::to_string(found.where));
  }
}

void transpose_is_an_involution() {
  Random random{5};
  for (int64_t rows : {0, 1, 17, 90}) {
    for (int64_t cols : {0, 1, 16, 70}) {
      const TestPattern pattern(&random, rows, cols, 0.3, true);
      const Pattern& p = pattern.view;
      std::vector<int32_t> tcrow(cols + 1), tcol(p.nnz), perm(p.nnz);
      transpose_pattern(p, tcrow.data(), tcol.data(), perm.data());
      bool ok = true;
      const Pattern t{cols, rows, p.nnz, tcrow.data(), tcol.data()};
      ok &= check_pattern(t).fault == PatternFault::none;
      std::vector<int64_t> row_of(p.nnz);
      reference::for_each_nonzero(p, [&](int64_t r, int64_t, int64_t k) { row_of[k] = r; });
      reference::for_each_nonzero(t, [&](int64_t c, int64_t r, int64_t k) {
        ok &= p.col[perm[k]] == c && row_of[perm[k]] == r;
      });
      std::vector<int32_t> crow(rows + 1), col(p.nnz), back(p.nnz);
      transpose_pattern(t, crow.data(), col.data(), back.data());
      ok &= crow == pattern.crow && col == pattern.col;
      for (int64_t k = 0; k < p.nnz; k++) ok &= perm[back[k]] == k;
      check(ok, "transpose_is_an_involution " + std::to_string(rows) + "x" + std::to_string(cols));
    }
  }
}

void a_changed_pattern_keeps_and_grows() {
  Random random{8};
  for (int64_t rows : {0, 1, 17, 60}) {
    for (int64_t cols : {0, 1, 16, 70}) {
      for (double density : {0.0, 0.3, 1.0}) {
        const TestPattern pattern(&random, rows, cols, density, false);
        const Pattern& p = pattern.view;
        std::vector<uint8_t> drop(p.nnz);
        std::vector<int32_t> old(rows * cols, -1);  // where each position was, -1 if it is free
        reference::for_each_nonzero(p, [&](int64_t r, int64_t c, int64_t k) {
          drop[k] = (k * 7 + r) % 3 == 0;
          old[r * cols + c] = static_cast<int32_t>(k);
        });
        std::vector<int64_t> grown;
        for (int64_t i = 0; i < rows * cols; i++)
          if ((old[i] < 0 || drop[old[i]]) && (i * 5) % 4 == 0) grown.push_back(i);
        const int64_t n = count_kept(p, drop.data()) + static_cast<int64_t>(grown.size());
        std::vector<int32_t> crow(rows + 1), col(n), source(n);
        auto change = [&](const std::vector<int64_t>& g) {
          return change_pattern(p, drop.data(), g.data(), static_cast<int64_t>(g.size()),
                                crow.data(), col.data(), source.data());
        };
        bool ok = change(grown).fault == GrowthFault::none;
        const Pattern made{rows, cols, n, crow.data(), col.data()};
        ok &= check_pattern(made).fault == PatternFault::none;
        size_t newcomers = 0;
        reference::for_each_nonzero(made, [&](int64_t r, int64_t c, int64_t k) {
          const int32_t before = old[r * cols + c];
          if (source[k] >= 0) {
            ok &= source[k] == before && !drop[before];
          } else {
            ok &= newcomers < grown.size() && grown[newcomers++] == r * cols + c;
          }
        });
        ok &= newcomers == grown.size();
        if (grown.size() > 1) {
          std::swap(grown[0], grown[1]);
          const GrowthCheck found = change(grown);
          ok &= found.fault == GrowthFault::not_increasing && found.where == 1;
          grown = {rows * cols};
          ok &= change(grown).fault == GrowthFault::out_of_range;
        }
        for (int64_t i = 0; i < rows * cols && n > 0; i++) {
          if (old[i] < 0 || drop[old[i]]) continue;
          grown = {i};
          std::vector<int32_t> more(p.nnz + 1), from(p.nnz + 1);
          const GrowthCheck found = change_pattern(p, drop.data(), grown.data(), 1, crow.data(),
                                                   more.data(), from.data());
          ok &= found.fault == GrowthFault::already_there && found.where == 0;
          break;
        }
        check(ok, "a_changed_pattern_keeps_and_grows " + std::to_string(rows) + "x" +
                      std::to_string(cols));
      }
    }
  }
}

void instruction_sets_are_chosen_by_name() {
  const KernelTable* first = nullptr;
  for (const KernelTable* const* t = kKernelTables; *t; t++) {
    const bool supported = (*t)->supported();
    if (supported && !first) first = *t;
    check(select_kernels((*t)->isa) == (supported ? *t : nullptr),
          std::string("instruction_sets_are_chosen_by_name ") + (*t)->isa);
    if (!t[1]) check(supported, "the last instruction set is always supported");
  }
  check(first && select_kernels(nullptr) == first && select_kernels("") == first,
        "the best supported instruction set is the default");
  check(!select_kernels("abacus"), "an unknown instruction set gives null");
}

void freed_scratch_is_used_again() {
  constexpr int64_t mib = 1 << 20;
  drop_scratch();
#if !defined(__SANITIZE_ADDRESS__)
  void* const first = take_scratch(mib);
  void* const second = take_scratch(mib);
  check(first != second, "two blocks in use are two");
  give_scratch(first, mib);
  give_scratch(second, mib);
  check(take_scratch(mib + 1) == second, "the block freed last is used again");
  void* const other = take_scratch(2 * mib);
  give_scratch(second, mib + 1);
  give_scratch(other, 2 * mib);
  const int64_t kept = drop_scratch();
  check(kept > 3 * mib && kept <= 4 * mib, "what is kept is counted");
  void* const large[] = {take_scratch(40 * mib), take_scratch(40 * mib)};
  for (void* data : large) give_scratch(data, 40 * mib);
  check(drop_scratch() <= 64 * mib, "no more than 64 MiB are kept");
#endif
  for (int64_t bytes : {0, 1, 63, 64, 65, 4097, 65535, 65536, 1 << 20}) {
    char* const data = static_cast<char*>(take_scratch(bytes));
    check(data && reinterpret_cast<uintptr_t>(data) % 64 == 0, "scratch is aligned");
    std::memset(data, 1, static_cast<size_t>(bytes));
    give_scratch(data, bytes);
  }
  give_scratch(nullptr, 5);
  drop_scratch();
  check(drop_scratch() == 0, "nothing is left");
}

// A test that cannot fail proves nothing: one wrong nonzero must be noticed.
void a_corrupted_nonzero_is_noticed() {
  Random random{6};
  const TestPattern pattern(&random, 16, 200, 0.5, false);
  const Pattern& p = pattern.view;
  const PlanPtr plan = make_plan(pattern);
  for (DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const RandomMatrix x(&random, Fill::signed_uniform, dtype, 7, p.cols, 0);
    const auto values = random_array(&random, Fill::signed_uniform, dtype, p.nnz);
    const auto y = reference::linear_forward(dtype, p, x.view, values->data(), nullptr);
    write(dtype, values->data(), 5, reference::read(dtype, values->data(), 5) + 0.5);
    Output out(dtype, 7 * p.rows);
    select_kernels(nullptr)->linear_forward(
        {dtype, plan.get(), x.view, values->data(), nullptr, out.data(), kSerial});
    check(first_wrong(dtype, Fill::signed_uniform, y, out.data()) >= 0,
          std::string("a_corrupted_nonzero_is_noticed ") + name_of(dtype));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "--quick");
  std::printf("instruction sets:");
  for (const KernelTable* const* t = kKernelTables; *t; t++)
    std::printf(" %s%s", (*t)->isa, (*t)->supported() ? "" : " (not on this CPU)");
  std::printf("\n");

  freed_scratch_is_used_again();
  faults_are_found();
  transpose_is_an_involution();
  a_changed_pattern_keeps_and_grows();
  instruction_sets_are_chosen_by_name();
  a_corrupted_nonzero_is_noticed();
  non_finite_samples_stay_alone();
  a_plan_is_shared_between_threads();
  few_samples_in_groups();
  more_rows_than_16_bits();
  all_shapes(quick);
  test_convolutions(quick);

  std::printf("largest error / bound: f32 %.3f, f64 %.3f, bf16 %.3f\n", worst[0], worst[1],
              worst[2]);
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed),
              static_cast<long long>(failed));
  return failed ? 1 : 0;
}
