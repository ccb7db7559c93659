// The parts that archer_fast._C is made of.
#pragma once

#include <pybind11/pybind11.h>

#include "trajectory_buffer.h"

namespace archer_fast {

using BufferClass = pybind11::class_<TrajectoryBuffer>;

BufferClass bind_trajectory_buffer(pybind11::module_& module);
void bind_batches(BufferClass& buffer);
void bind_features(BufferClass& buffer);
void bind_open_trajectory(pybind11::module_& module);
void bind_token_packer(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);

}  // namespace archer_fast
