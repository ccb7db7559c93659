// Games cut into passes.
#include "token_packer.h"

#include "arrays.h"
#include "module.h"

namespace archer_fast {
namespace {

py::tuple plan_tokens(const Ids& lengths, std::int64_t max_tokens, std::int64_t num_ranks) {
  const auto items = copied("lengths", lengths);
  TokenPlan plan;
  {
    const py::gil_scoped_release release;
    plan = pack_tokens(items, max_tokens, num_ranks);
  }
  return py::make_tuple(to_array<std::int64_t>(std::move(plan.item_ids)),
                        to_array<std::int64_t>(std::move(plan.cu_bins)));
}

}  // namespace

void bind_token_packer(py::module_& module) {
  module.def("pack_tokens", &plan_tokens, array("lengths"), "max_tokens"_a, "num_ranks"_a);
}

}  // namespace archer_fast
