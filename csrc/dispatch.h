// Which table is in use.
#pragma once

#include "table.h"

namespace commkit {

const Table &table();

} // namespace commkit
