// The operator "Identity" of the graph-operator path.
#pragma once

#include "graph_operator.h"

namespace softnpu {

// Between the NZ format and rows and columns.
int format_cast(const GraphCall& call);

}  // namespace softnpu
